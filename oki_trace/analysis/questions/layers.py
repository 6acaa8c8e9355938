"""layers: how each layer's distribution compares with the final one."""

from __future__ import annotations

from dataclasses import replace

from oki_trace.analysis.lens_choice import LENSES, ORIGIN, require_rows
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.question import (
    Answer,
    Column,
    Drawing,
    Question,
    Request,
    View,
    run_statement,
)
from oki_trace.analysis.scope import OF_KIND, compose

_MODEL = Column("model", "name", "the model")
_LAYER = Column("layer", "number", "0: the embedding; the last: the model's output")
_AGREEMENT = (
    Column("agreement", "share", "steps whose token is the layer's most likely one"),
    Column("chosen_prob", "share", "mean probability of the token at the layer"),
)
_ENTROPY = Column("entropy", "number", "mean entropy of the layer's distribution", "nats")
_KL = Column("kl", "number", "mean KL(final distribution ‖ layer's)", "nats", "KL")


def _run(session: QuerySession, request: Request) -> Answer:
    """Several lenses are compared, layer by layer."""
    if "," in str(request.options["lens"]):
        request = replace(request, view="lens")
    return require_rows(session, request, run_statement(session, request))


LAYERS = Question(
    "layers",
    "Layers",
    "Layer by layer",
    "How often each layer already predicts the chosen token, and how far its distribution is from "
    "the final one.",
    "Agreement is the share of steps at which the chosen token is the layer's most likely token; "
    "entropy measures how undecided the layer is; kl is the distance of its distribution from the "
    "final one. The lens that is closer to it at a layer is the better calibrated one there.",
    {
        "layer": View(
            compose(
                """
WITH scope AS ($scope)
SELECT model_id AS model, layer, count(*) AS steps,
  avg((chosen_rank = 1)::INT) AS agreement,
  avg(chosen_prob) AS chosen_prob,
  avg(entropy) AS entropy,
  avg(kl) AS kl
FROM lens_layer JOIN scope USING (message_id)
WHERE $of_kind AND lens = $lens
GROUP BY model_id, layer
ORDER BY model, layer
""",
                of_kind=OF_KIND,
            ),
            (
                _MODEL,
                _LAYER,
                Column("steps", "number", "steps"),
                *_AGREEMENT,
                _ENTROPY,
                _KL,
            ),
            {
                "agreement": Drawing("lines", ("layer",), ("agreement", "chosen_prob")),
                "entropy": Drawing("lines", ("layer",), ("entropy",)),
                "KL": Drawing("lines", ("layer",), ("kl",)),
            },
        ),
        "lens": View(
            compose(
                """
WITH scope AS ($scope),
read AS (
  SELECT *, count(DISTINCT lens) OVER (PARTITION BY model_id) AS lenses
  FROM lens_layer JOIN scope USING (message_id)
  WHERE $of_kind
    AND (NOT contains($lens, ',') OR list_contains(string_split($lens, ','), lens))
),
common AS (
  SELECT step_id FROM read GROUP BY step_id
  HAVING count(DISTINCT lens) = CASE WHEN contains($lens, ',')
    THEN len(string_split($lens, ',')) ELSE any_value(lenses) END
)
SELECT model_id AS model, layer, lens, count(*) AS steps,
  avg(kl) AS kl,
  avg((chosen_rank = 1)::INT) AS agreement,
  avg(chosen_prob) AS chosen_prob,
  avg(entropy) AS entropy
FROM read JOIN common USING (step_id)
GROUP BY model_id, layer, lens
ORDER BY model, layer, lens <> 'logit', lens
""",
                of_kind=OF_KIND,
            ),
            (
                _MODEL,
                _LAYER,
                Column("lens", "name", "logit, or the name of an installed lens"),
                Column("steps", "number", "steps that all of these lenses have read"),
                _KL,
                *_AGREEMENT,
                _ENTROPY,
            ),
            {
                "KL": Drawing("lines", ("layer",), ("kl",), colour="lens"),
                "agreement": Drawing("lines", ("layer",), ("agreement",), colour="lens"),
                "entropy": Drawing("lines", ("layer",), ("entropy",), colour="lens"),
            },
        ),
    },
    {"lens": LENSES, "origin": ORIGIN},
    run=_run,
)
