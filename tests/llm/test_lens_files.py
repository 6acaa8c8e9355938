"""Files of lenses from anywhere: each that is not one is refused in a line, and none is run."""

from __future__ import annotations

import collections
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oki_trace.errors import ModelError, UsageError
from oki_trace.llm.lenses import library
from oki_trace.llm.lenses.files import read_lens
from tests.llm.test_lenses import jacobian_file, tuned_folder

WIDTH, LAYERS = 8, 3


class _Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "it ran")


def _maps(**changed: Any) -> dict[int, Any]:
    maps: dict[int, Any] = {layer: torch.eye(WIDTH).half() for layer in range(LAYERS - 1)}
    return maps | {0: changed["first"]} if changed else maps


def _nan() -> torch.Tensor:
    made = torch.eye(WIDTH).half()
    made[2, 3] = float("nan")
    return made


CONTENTS: dict[str, tuple[dict[str, Any], str]] = {
    "other width": ({"d_model": 9}, r"J of layer 0 is \(8, 8\), not \(9, 9\)"),
    "no width": ({"d_model": 0}, "d_model is 0"),
    "huge width": ({"d_model": 2**40}, "d_model is 1099511627776"),
    "bool width": ({"d_model": True}, "d_model is True"),
    "float64": ({"J": _maps(first=torch.eye(WIDTH).double())}, "is float64, not"),
    "integers": ({"J": _maps(first=torch.eye(WIDTH).long())}, "is int64, not"),
    "wrong shape": ({"J": _maps(first=torch.eye(7).half())}, r"is \(7, 7\), not"),
    "a vector": ({"J": _maps(first=torch.ones(WIDTH).half())}, r"is \(8,\), not"),
    "zeros without memory": (
        {"J": _maps(first=torch.zeros(1).half().expand(50_000, 100_000))},
        r"is \(50000, 100000\), not",
    ),
    "one number repeated": (
        {"J": _maps(first=torch.ones(1).half().expand(WIDTH, WIDTH))},
        "fewer numbers than its shape says",
    ),
    "NaN": ({"J": _maps(first=_nan())}, "has a NaN or an infinity"),
    "no tensor": ({"J": _maps(first=[1.0])}, "is not a tensor"),
    "extra entry": ({"extra": 1}, "unknown entry 'extra'"),
    "extra layer": ({"source_layers": [0, 1, 2]}, "not the layers of J"),
    "no layers": ({"source_layers": [], "J": {}}, "not the layers of J"),
    "negative layer": ({"source_layers": [-1, 0]}, "a source layer is -1"),
    "layers out of order": ({"source_layers": [1, 0]}, "not the layers of J"),
    "layers as text": ({"source_layers": "01"}, "source_layers not a list"),
    "J as a list": ({"J": [1]}, "J is not a dict"),
    "another capture point": ({"provenance": {"capture_point": "mlp_out"}}, "it reads mlp_out"),
    "several streams": (
        {"provenance": {"capture_point": "block_output", "stream_reduce": "mean"}},
        "several residual streams",
    ),
    "provenance as text": ({"provenance": "x"}, "its provenance is not a dict"),
    "negative prompts": ({"n_prompts": -1}, "n_prompts is -1"),
}


def refusal(path: Path) -> str:
    """The line with which a file is refused."""
    with pytest.raises(ModelError) as caught:
        read_lens(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    return text


@pytest.mark.parametrize("name", CONTENTS)
def test_a_wrong_content_is_refused(name: str, tmp_path: Path) -> None:
    changed, reason = CONTENTS[name]
    path = jacobian_file(tmp_path / "lens.pt", WIDTH, LAYERS, **changed)
    with pytest.raises(ModelError, match=reason):
        read_lens(path)
    assert refusal(path).startswith(f"{path} is not used: ")


@pytest.mark.parametrize("content", [[1, 2], {"J": {}}, torch.eye(2), "text"])
def test_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "lens.pt")
    assert "it has no J, source_layers and d_model" in refusal(tmp_path / "lens.pt")


def test_code_is_not_run(tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "lens.pt"
    torch.save({"J": _Code(ran)}, path)
    assert "it holds pickled code (" in refusal(path)
    path.write_bytes(pickle.dumps(_Code(ran)))
    assert "it is not a torch file" in refusal(path)
    assert not ran.exists()


@pytest.mark.parametrize("value", [bytearray(10), collections.Counter("a"), torch.device("cpu")])
def test_a_pickle_may_name_nothing_but_tensors(value: Any, tmp_path: Path) -> None:
    torch.save({"J": value}, tmp_path / "lens.pt")
    assert "it holds pickled code" in refusal(tmp_path / "lens.pt")


def _rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def test_zeros_that_unpack_to_gigabytes_are_refused(tmp_path: Path) -> None:
    path = jacobian_file(tmp_path / "lens.pt", WIDTH, LAYERS)
    _rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert "it is compressed" in refusal(path)
    path = jacobian_file(tmp_path / "lens.pt", WIDTH, LAYERS)
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (0xFFFFFFF0).to_bytes(4, "little")  # its size unpacked
    path.write_bytes(data)
    assert "it declares more bytes than it has" in refusal(path)


def test_a_storage_that_is_shorter_than_declared_is_refused(tmp_path: Path) -> None:
    path = jacobian_file(tmp_path / "lens.pt", WIDTH, LAYERS)
    shorten = lambda name, data: data[:16] if "/data/" in name else data  # noqa: E731
    _rewritten(path, shorten, zipfile.ZIP_STORED)
    assert "a storage of 128 bytes has 16" in refusal(path)


@pytest.mark.parametrize("size", [0, 1, 100, 1000, 1500])
def test_a_cut_file_is_refused(size: int, tmp_path: Path) -> None:
    path = jacobian_file(tmp_path / "lens.pt", WIDTH, LAYERS)
    path.write_bytes(path.read_bytes()[:size])
    assert "it is not a torch file" in refusal(path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"d_model": 9}, r"0.weight is \(8, 8\), not \(9, 9\)"),
        ({"d_model": "8"}, "d_model is 8, not a number"),
        ({"num_hidden_layers": 4}, "it lacks 3.bias, 2 entries"),
        ({"num_hidden_layers": 2}, "unknown entry '2.bias'"),
        ({"bias": False}, "unknown entry '0.bias'"),
        ({"lens_type": "other"}, "its lens_type is other"),
    ],
)
def test_a_tuned_lens_that_its_config_does_not_describe_is_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tuned_folder(tmp_path / "tuned", WIDTH, LAYERS, **config)
    with pytest.raises(ModelError, match=reason):
        read_lens(folder)
    refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, " " * 2_000_000])
def test_a_broken_config_is_refused(text: str, tmp_path: Path) -> None:
    folder = tuned_folder(tmp_path / "tuned", WIDTH, LAYERS)
    (folder / "config.json").write_text(text)
    refusal(folder)


def test_a_folder_without_a_lens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "has no params.pt" in refusal(tmp_path)


@pytest.fixture
def lenses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lenses"
    monkeypatch.setattr(library, "lenses_dir", lambda: folder)
    return folder


def test_lenses_are_added_listed_and_removed(lenses: Path, tmp_path: Path) -> None:
    made = library.add(str(jacobian_file(tmp_path / "My Lens (1).pt", WIDTH, LAYERS)))
    assert (made.name, made.kind, made.layers) == ("my-lens-1", "jacobian", (1, 2))
    other = library.add(str(tuned_folder(tmp_path / "tuned", WIDTH, LAYERS)), "other")
    assert library.all_installed() == [made, other] and other.fitted.layers == LAYERS
    with pytest.raises(UsageError, match="installed already"):
        library.add(str(tmp_path / "tuned"), "other")
    library.remove("other")
    assert library.all_installed() == [made]
    with pytest.raises(UsageError, match=r"No lens other .*\(installed: my-lens-1\)"):
        library.remove("other")
    assert sorted(path.name for path in lenses.iterdir()) == ["my-lens-1"]


@pytest.mark.parametrize("name", ["logit", "../up", "A", "", "a/b", ".hidden"])
def test_a_name_cannot_be_a_path(name: str, lenses: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        library.remove(name)
    if name:
        with pytest.raises(UsageError):
            library.add(str(jacobian_file(tmp_path / "a.pt", WIDTH, LAYERS)), name)
    assert not lenses.exists()


def test_a_refused_lens_leaves_nothing(lenses: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        library.add(str(jacobian_file(tmp_path / "a.pt", WIDTH, LAYERS, extra=1)))
    assert not lenses.exists()


def test_a_damaged_installation_says_how_to_repair_it(lenses: Path, tmp_path: Path) -> None:
    library.add(str(jacobian_file(tmp_path / "a.pt", WIDTH, LAYERS)))
    (lenses / "a" / "maps.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="lens remove a"):
        library.load_transport("a")
    (lenses / "a" / "lens.json").write_text("{}")
    with pytest.raises(ModelError, match="lens remove a"):
        library.installed("a")
    assert library.all_installed() == []


def test_a_lens_comes_from_the_hubs_cache(
    lenses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder laid out as huggingface_hub does; the tests run offline."""
    commit = "0" * 40
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for kind, path in (("models", "m/jlens/pile"), ("spaces", "lens/own")):
        root = cache / f"{kind}--someone--lenses"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        inside = root / "snapshots" / commit / path
        inside.parent.mkdir(parents=True)
        if kind == "spaces":
            tuned_folder(inside, WIDTH, LAYERS)
        else:
            inside.mkdir()
            jacobian_file(inside / "M_jacobian_lens.pt", WIDTH, LAYERS)
    made = library.add("someone/lenses/m/jlens/pile/M_jacobian_lens.pt")
    assert (made.kind, made.fitted.model) == ("jacobian", "M")
    assert json.loads((lenses / made.name / "lens.json").read_text())["source"].startswith(
        "someone"
    )
    assert library.add("someone/lenses/lens/own").kind == "tuned"
    for absent in ("someone/lenses/none.pt", "nobody/nothing/lens"):
        with pytest.raises(ModelError, match="cannot be fetched from the hub") as caught:
            library.add(absent)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="There is no nothing here"):
        library.add("nothing")
