"""The page's own style, beside the theme in ``.streamlit/config.toml``."""

from __future__ import annotations

import streamlit as st

# Static text of ours; nothing a model or a user wrote comes here.
_STYLE = """
<style>
  .block-container { padding: 2.6rem clamp(1rem, 3vw, 2.6rem) 1rem; max-width: 1700px; }
  /* With the sidebar shut the header is no longer empty: nothing may lie below it. */
  [data-testid="stApp"]:has([data-testid="stExpandSidebarButton"]) .block-container {
    padding-top: 4.4rem;
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
  @media (max-width: 1150px) {
    /* One column: the conversation, then the step, then the map. */
    [data-testid="stColumn"]:has(.st-key-map),
    [data-testid="stColumn"]:has(.st-key-map) > [data-testid="stVerticalBlock"] {
      display: contents;
    }
    [data-testid="stColumn"]:has(.st-key-panel) { order: 2; }
    [data-testid="stLayoutWrapper"]:has(> .st-key-map) { order: 3; }
    .st-key-sides [data-testid="stHorizontalBlock"]:has(> [data-testid="stColumn"] .st-key-panel) {
      flex-direction: column; gap: 1rem;
    }
    .st-key-sides [data-testid="stHorizontalBlock"]:has(> [data-testid="stColumn"] .st-key-panel)
      > [data-testid="stColumn"] { width: 100% !important; flex: 1 1 100% !important; }
  }
  @media (min-width: 1151px) {
    [data-testid="stColumn"]:has(> div .st-key-panel), [data-testid="stColumn"]:has(.st-key-panel) {
      position: sticky; top: 2.6rem; max-height: calc(100vh - 5rem); overflow-y: auto;
      border-left: 1px solid var(--st-border-color, #8884); padding-left: 1.4rem;
    }
  }
  .st-key-recent button { justify-content: flex-start; text-align: left; padding: 0.15rem 0; }
  .st-key-recent button p { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .st-key-recent button div { justify-content: flex-start; min-width: 0; }
  .st-key-panel h4 { font-size: 0.95rem; padding: 0.9rem 0 0.2rem; }
</style>
"""


def apply() -> None:
    """Put the style onto the page."""
    st.html(_STYLE)
