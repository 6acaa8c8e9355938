"""The CSS of the pages, on top of the theme in ``.streamlit/config.toml``."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from oki_trace.launcher import is_loopback

# Static text of ours; no text of a model or a user is inserted.
_STYLE = """
<style>
  :root {
    --oki-back: BACK; --oki-line: LINE; --oki-focus: FOCUS;
    --oki-side: clamp(1rem, 3vw, 2.6rem);
  }
  .block-container { padding: 2.6rem var(--oki-side) 1rem; max-width: 1700px; }
  .block-container h4 { font-size: 1.12rem; padding: 0.8rem 0 0.5rem; }
  /* With the sidebar closed the header has a button: nothing may lie below it. */
  [data-testid="stApp"]:has([data-testid="stExpandSidebarButton"]) .block-container {
    padding-top: 4.4rem;
  }
  /* Keyboard focus is visible. */
  [data-testid="stCheckbox"] label:has(input:focus-visible),
  a:focus-visible, button:focus-visible, summary:focus-visible, canvas:focus-visible,
  [data-testid="stSelectbox"]:has(input:focus-visible) [role="group"],
  [data-testid="stMultiSelect"]:has(input:focus-visible) [role="group"] {
    outline: 2px solid var(--oki-focus) !important; outline-offset: 1px; border-radius: 6px;
  }
  .st-key-heading { flex-wrap: nowrap; }
  .st-key-heading > :has(> [data-testid="stText"]) { flex: 1 1 0; min-width: 0; }
  .st-key-heading > .st-key-colour { flex: none; }
  .st-key-heading [data-testid="stText"] span {
    display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
    font-weight: 600;
  }
  @media (max-width: 1000px) {
    .st-key-heading { flex-wrap: wrap; }
    .st-key-heading > :has(> [data-testid="stText"]) { flex: 1 1 100%; }
  }
  .st-key-sides [data-testid="stHorizontalBlock"]:has(> [data-testid="stColumn"]) {
    align-items: flex-start;
  }
  /* The message box stays in sight, however long the conversation. */
  .st-key-say {
    position: sticky; bottom: 0; z-index: 3; padding: 0.5rem 0 0.7rem;
    background: linear-gradient(transparent, var(--oki-back) 0.5rem);
  }
  .st-key-welcome .st-key-say { position: static; }
  @media (max-width: 1150px) {
    /* One column: conversation and map, and the step as a sheet at the bottom. */
    .st-key-sides [data-testid="stHorizontalBlock"]:has(> [data-testid="stColumn"] .st-key-panel) {
      flex-direction: column; gap: 0;
    }
    .st-key-sides [data-testid="stHorizontalBlock"]:has(> [data-testid="stColumn"] .st-key-panel)
      > [data-testid="stColumn"] { width: 100% !important; flex: 1 1 100% !important; }
    .st-key-say { position: static; }
    [data-testid="stColumn"]:has(.st-key-panel) {
      position: sticky; bottom: 0; z-index: 4; max-height: 46vh; overflow-y: auto;
      background: var(--oki-back); border-top: 1px solid var(--oki-line);
      box-shadow: 0 -10px 20px -8px #00000026; padding: 0.8rem var(--oki-side) 0.6rem;
      margin: 0 calc(-1 * var(--oki-side)); box-sizing: content-box;
      width: 100% !important;
    }
    /* Folded to the token and its numbers. */
    .oki-folded [data-testid="stColumn"]:has(.st-key-panel) {
      max-height: 6.6rem; overflow: hidden;
    }
  }
  @media (min-width: 1151px) {
    [data-testid="stColumn"]:has(.st-key-panel) {
      position: sticky; top: 2.6rem; max-height: calc(100vh - 3.4rem); overflow-y: auto;
      border-left: 1px solid var(--oki-line); padding: 0 0.4rem 0 1.4rem;
      scrollbar-width: thin;
    }
  }
  .st-key-recent button, .st-key-asks button {
    justify-content: flex-start; text-align: left; padding: 0.1rem 0; min-height: 1.9rem;
  }
  .st-key-recent button p, .st-key-asks button p {
    overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  }
  .st-key-recent button div, .st-key-asks button div { justify-content: flex-start; min-width: 0; }
  .st-key-model-card { gap: 0.35rem; padding: 0.6rem 0.8rem; }
  .st-key-model-card [data-testid="stHorizontalBlock"] { gap: 0.3rem; }
  .st-key-model-card [data-testid="stCaptionContainer"] { margin-bottom: 0; }
  .st-key-model-card [data-testid="stCaptionContainer"] p { margin: 0; }
  .st-key-model-card p { overflow-wrap: anywhere; }
  @media (max-width: 1000px) {
    .st-key-compare-choice > div { flex: 1 1 100%; }
    .st-key-two-steps [data-testid="stHorizontalBlock"] { flex-direction: column; }
    .st-key-two-steps [data-testid="stColumn"] { width: 100% !important; }
  }
  .st-key-kept { gap: 0.4rem; flex-wrap: nowrap; }
  .st-key-kept button { display: none; }
  .st-key-panel h4, .st-key-map h4 { font-size: 0.95rem; padding: 0.5rem 0 0.1rem; }
  .st-key-evidence-head, .st-key-lens-head, .st-key-curves-head, .st-key-map-head {
    gap: 0.3rem 0.5rem; margin-top: 0.4rem;
  }
  .st-key-evidence-head h4, .st-key-lens-head h4, .st-key-curves-head h4, .st-key-map-head h4 {
    font-size: 0.95rem; padding: 0; line-height: 1.9rem;
  }
  .st-key-evidence-head [data-testid="stMarkdownContainer"],
  .st-key-lens-head [data-testid="stMarkdownContainer"],
  .st-key-curves-head [data-testid="stMarkdownContainer"],
  .st-key-map-head [data-testid="stMarkdownContainer"] { margin-bottom: 0; }
  .st-key-panel [data-testid="stVerticalBlock"] { gap: 0.55rem; }
  .st-key-panel [data-baseweb="select"] > div, .st-key-map-head [data-baseweb="select"] > div {
    min-height: 2rem; font-size: 0.85rem;
  }
  .st-key-panel [data-testid="stSegmentedControl"] button,
  .st-key-panel [data-testid="stButtonGroup"] button,
  .st-key-map-head [data-testid="stButtonGroup"] button {
    min-height: 1.9rem; padding: 0.1rem 0.6rem; font-size: 0.82rem;
  }
  /* Questions and SQL. */
  .st-key-asks [data-testid="stCaptionContainer"] { padding-top: 0.7rem; }
  .st-key-sql-editor textarea {
    font-family: "Source Code Pro", ui-monospace, monospace; font-size: 0.88rem; line-height: 1.5;
  }
  .st-key-sql-result-head { gap: 0.5rem; }
  .st-key-sql-result-head button { padding-left: 0.5rem; padding-right: 0.6rem; }
  .st-key-sql-tables h4 { font-size: 0.95rem; padding: 0 0 0.6rem; }
  .st-key-sql-tables table { font-size: 0.82rem; }
  .st-key-sql-tables thead { display: none; }
  .st-key-sql-tables [data-testid="stMarkdownContainer"] { overflow-x: auto; }
  .st-key-sql-tables td { padding: 0.2rem 0.5rem 0.2rem 0; border: none; vertical-align: top; }
  @media (max-width: 1150px) {
    .st-key-sql-sides [data-testid="stHorizontalBlock"]:has(> [data-testid="stColumn"]) {
      flex-direction: column;
    }
    .st-key-sql-sides [data-testid="stColumn"] { width: 100%; flex: 1 1 100%; }
  }
</style>
"""


def logo() -> None:
    """The logo in the colours of the current theme."""
    st.logo(Path(__file__).with_name(f"logo-{_theme()}.svg"), size="large")


def apply() -> None:
    """Add the CSS to the page."""
    # Streamlit defines CSS variables for its colours only inside components.
    back, line, focus = (
        str(st.get_option(f"theme.{_theme()}.{name}") or fallback)
        for name, fallback in (
            ("backgroundColor", "Canvas"),
            ("borderColor", "GrayText"),
            ("primaryColor", "Highlight"),
        )
    )
    st.html(_STYLE.replace("BACK", back).replace("LINE", line).replace("FOCUS", focus))


def warn_if_public() -> None:
    """Warn on every page if other machines can reach the explorer."""
    address = st.get_option("server.address")
    if address is None or not is_loopback(str(address)):
        st.warning(
            "Other machines can reach this explorer, and it has no password: anyone who finds it "
            "can read and delete every conversation.",
            icon=":material/public:",
        )


def _theme() -> str:
    return "dark" if st.context.theme.type == "dark" else "light"
