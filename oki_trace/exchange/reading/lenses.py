"""Builds the lenses of a step from the validated fields of a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.lists import check_ranks, floats
from oki_trace.exchange.reading.replies import TokenIds
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.trace_object import BLANK
from oki_trace.records import LOGIT, CaptureReport, Lens


class LensReader:
    """Reads the lenses of one step. Raises ExchangeError."""

    def __init__(
        self, step_index: int, token_id: int, capture: CaptureReport, ids: TokenIds, where: str
    ) -> None:
        self._step_index = step_index
        self._token_id = token_id
        self._layers = capture.layers
        # Given tokens may be read at fewer layers; else the Logit Lens has all.
        some = step_index < 0 and capture.policy.lens_layers not in (None, "all")
        self._whole = () if some else (LOGIT,)
        self._ids = ids
        self._where = where
        self._cells = 0

    def read(self, values: validation.Step) -> tuple[Lens | None, tuple[Lens, ...]]:
        """The Logit Lens, and the readings by other lenses in the order of their names."""
        lens = self._lens(LOGIT, values.get("logit_lens") or (), "logit_lens")
        others = sorted((values.get("lenses") or {}).items())
        readings = [self._lens(name, rows, f"lens {name}") for name, rows in others]
        return lens, tuple(reading for reading in readings if reading is not None)

    def _lens(self, name: str, given: Sequence[validation.LensLayer], label: str) -> Lens | None:
        """A reading; a layer that is missing although the lens read all of them is blank."""
        rows: dict[int, validation.LensLayer] = {}
        for row in given:
            here = f"{self._where}, {label} of layer {row['layer']}"
            if row["layer"] in rows:
                raise refused(f"{here}: it occurs twice")
            if row["layer"] > self._layers:
                raise refused(f"{here}: the model has {self._layers:,} layers")
            check_ranks(row.get("topk") or (), here)
            rows[row["layer"]] = row
        if not rows:
            return None
        if name not in self._whole and self._layers not in rows:
            raise refused(f"{self._where}, {label}: it lacks the last layer, {self._layers:,}")
        every = range(self._layers + 1)
        numbers = list(every) if name in self._whole else sorted(rows)
        k = max(1, *(len(row.get("topk") or ()) for row in rows.values()))
        self._cells += len(numbers) * k
        if self._cells > validation.MAX_CELLS:
            raise refused(f"{self._where}: {label} has more than {validation.MAX_CELLS:,} entries")
        return self._record(name, [(layer, rows.get(layer)) for layer in numbers], k)

    def _record(
        self, name: str, rows: Sequence[tuple[int, validation.LensLayer | None]], k: int
    ) -> Lens:
        """A record of ``k`` tokens a layer; shorter lists are filled up with blanks."""
        blanks: list[validation.LensToken] = [{"token": ""}] * k
        missing: validation.LensLayer = {"layer": 0}
        cells: list[validation.LensToken] = []
        token_ids, tokens, numbers = [], [], []
        for _, given in rows:
            row = given or missing
            entries = row.get("topk") or []
            own_ids = [self._ids.of(entry.get("token_id"), entry["token"]) for entry in entries]
            rank, prob = row.get("chosen_rank"), row.get("chosen_prob")
            if self._token_id in own_ids:
                at = own_ids.index(self._token_id)
                rank = at + 1 if rank is None else rank
                prob = entries[at].get("prob") if prob is None else prob
            numbers.append((rank or 0, prob, row.get("entropy"), row.get("kl")))
            short = k - len(entries)
            entries = entries + blanks[:short]
            cells += entries
            token_ids.append(own_ids + [BLANK] * short)
            tokens.append(tuple([entry["token"] for entry in entries]))
        ranks, probs, entropy, kl = zip(*numbers, strict=True)
        shape = (len(rows), k)
        layers = [layer for layer, _ in rows]
        return Lens(
            step_index=self._step_index,
            token_ids=np.array(token_ids, dtype=np.int64),
            tokens=tuple(tokens),
            logits=floats(cells, "logit").reshape(shape),
            probs=floats(cells, "prob").reshape(shape),
            entropy=np.array(entropy, dtype=np.float32),
            chosen_rank=np.array(ranks, dtype=np.int64),
            chosen_prob=np.array(probs, dtype=np.float32) + np.float32(0),
            kl=np.array(kl, dtype=np.float32),
            name=name,
            layers=None if layers == list(range(len(layers))) else np.array(layers),
        )
