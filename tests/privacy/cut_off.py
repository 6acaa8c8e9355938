"""Everything oki-trace does, in a network that ends at this machine.

``python -m tests.privacy.cut_off STORE`` makes itself a network namespace that
has the loopback address alone (Linux), so that nothing it starts can reach
further, and does what users do: a traced turn, questions, exports, an import,
every page, and a turn asked for in the explorer. It prints, as JSON, what was
done and how often the kernel was asked for a way out, by any process and in any
language; ``witness/sitecustomize.py`` names the tries of Python's own sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import io
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A documentation address: nobody's.
ABROAD = "192.0.2.1"
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def cut_off() -> bool:
    """Leave the machine's network for an empty one; False where that cannot be done."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNET) != 0:
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, name))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))
    return True


def tries_to_leave() -> int:
    """How often the kernel found no way to an address, in this namespace."""
    names, values = (
        line.split()
        for line in Path("/proc/self/net/snmp").read_text().splitlines()
        if line.startswith("Ip:")
    )
    four = int(values[names.index("OutNoRoutes")])
    six = 0
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/self/net/snmp6").read_text().splitlines():
            if line.startswith("Ip6OutNoRoutes"):
                six = int(line.split()[1])
    return four + six


def control() -> None:
    """An outgoing connection that only the kernel sees: in isolated mode there is no witness."""
    code = (
        f"import socket\ntry: socket.create_connection(({ABROAD!r}, 80), 5)\nexcept OSError: pass"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=30)


def command(*arguments: str) -> str:
    """A command of ours, in this process, which has torch imported once."""
    from oki_trace.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(arguments)
        except SystemExit as ended:
            assert not ended.code, (arguments, ended.code, out.getvalue())
    return out.getvalue()


def on_the_command_line(folder: Path) -> list[str]:
    said = command("run", "What is the capital of France?", "--max-new-tokens", "8", "--json")
    assert json.loads(said)["steps"] == 8, said
    every_question()
    command("sql", "SELECT count(*) FROM step")
    command("verify")
    for format in ("json", "html", "parquet"):
        target = str(folder / f"a.{format}")
        command("export", "--conversation", "1", "--format", format, "--output", target)
    command("import", str(folder / "a.json"))
    return ["run", "ask", "sql", "verify", "export", "import"]


def every_question() -> None:
    """In each of its views, on the reply that is there, which kept its tensors."""
    from oki_trace.analysis.questions import QUESTIONS

    subjects = {"step": ("2:0", "2:1"), "reply": ("2", "2"), "model": ("smollm2", "smollm2")}
    for question in QUESTIONS.values():
        for name in question.offered:
            view = question.views[name]
            two = subjects[view.compares] if view.compares else ()
            assert command("ask", question.name, *two, "--by", name, "--format", "csv")
            if two:
                assert "from full logits" in command("ask", question.name, *two)
    assert command("ask", "heads")


def a_page(name: str) -> None:
    import importlib

    importlib.import_module(f"dashboard.views.{name}").page()


def page_names() -> list[str]:
    """The views that are pages."""
    import importlib

    names = sorted(path.stem for path in (ROOT / "dashboard" / "views").glob("*.py"))
    modules = {name: importlib.import_module(f"dashboard.views.{name}") for name in names}
    return [name for name, module in modules.items() if callable(getattr(module, "page", None))]


def in_the_explorer(db: str) -> list[str]:
    """Every page on the reply, and a turn asked for by chat, which a worker answers."""
    from streamlit.testing.v1 import AppTest

    from oki_trace.store.reading.reader import TraceReader
    from tests.waiting import until

    place = {"conversation": "1", "message": "2", "step": "3"}
    names = page_names()
    for name in names:
        app = AppTest.from_function(a_page, args=(name,), default_timeout=120)
        for key, value in place.items():
            app.query_params[key] = value
        app.run()
        assert not app.exception and not app.error, (name, app.exception, app.error, app.code)
    app = AppTest.from_file(str(ROOT / "dashboard" / "Home.py"), default_timeout=120)
    app.run()
    app.chat_input[0].set_value("What is the capital of France?").run()
    assert not app.exception and not app.error, (app.exception, app.error, app.code)
    with TraceReader(db) as reader:

        def answered() -> Any:
            replies = [m for c in reader.conversations() for m in reader.messages(c.id) if m.choice]
            assert not [m.reason for m in replies if m.status.value == "failed"]
            # One traced by the command, one imported, one asked for here.
            return len(replies) == 3 and not any(m.status.is_live for m in replies)

        until(answered, "the worker to answer")
    return [*names, "chat"]


def as_a_server(db: str) -> list[str]:
    """``oki-trace ui`` as users start it, asked for its first page."""
    from tests.dashboard import server

    port = server.free_port()
    output = Path(db).with_name("ui.txt")
    explorer = server.start(["oki_trace", "ui", "--port", str(port), "--db", db], db, port, output)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/")
        assert b"<html" in connection.getresponse().read()
        connection.close()
    finally:
        explorer.close()
    return ["ui"]


def run(db: str) -> dict[str, Any]:
    own = cut_off()
    before = tries_to_leave() if own else 0
    if own:
        control()
    seen_control = own and tries_to_leave() - before == 1
    began = tries_to_leave() if own else 0
    os.environ["OKI_TRACE_DB"] = db
    done = on_the_command_line(Path(db).parent)
    done += in_the_explorer(db)
    done += as_a_server(db)
    from huggingface_hub import constants

    return {
        "namespace": own,
        "control": seen_control,
        "tries": tries_to_leave() - began if own else 0,
        "done": done,
        "hub_telemetry": not constants.HF_HUB_DISABLE_TELEMETRY,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(run(sys.argv[1])), flush=True)
