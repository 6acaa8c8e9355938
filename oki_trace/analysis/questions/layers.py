"""layers: how each layer's distribution compares with the final one."""

from __future__ import annotations

from oki_trace.analysis.question import Column, Drawing, Question, View

LAYERS = Question(
    "layers",
    "Layers",
    "Layer by layer",
    "How often each layer already predicts the chosen token, and how far its distribution is from "
    "the final one.",
    "Agreement is the share of steps at which the chosen token is the layer's most likely token; "
    "entropy measures how undecided the layer is; kl is the distance of its distribution from the "
    "final one.",
    {
        "layer": View(
            """
WITH scope AS ($scope)
SELECT model_id AS model, layer, count(*) AS steps,
  avg((chosen_rank = 1)::INT) AS agreement,
  avg(chosen_prob) AS chosen_prob,
  avg(entropy) AS entropy,
  avg(kl) AS kl
FROM lens_layer JOIN scope USING (message_id)
WHERE step_index IS NOT NULL AND lens = 'logit'
GROUP BY model_id, layer
ORDER BY model, layer
""",
            (
                Column("model", "name", "the model"),
                Column("layer", "number", "0: the embedding; the last: the model's output"),
                Column("steps", "number", "steps"),
                Column("agreement", "share", "steps whose token is the layer's most likely one"),
                Column("chosen_prob", "share", "mean probability of the token at the layer"),
                Column("entropy", "number", "mean entropy of the layer's distribution", "nats"),
                Column("kl", "number", "mean KL(final distribution ‖ layer's)", "nats", "KL"),
            ),
            {
                "agreement": Drawing("lines", ("layer",), ("agreement", "chosen_prob")),
                "entropy": Drawing("lines", ("layer",), ("entropy",)),
                "KL": Drawing("lines", ("layer",), ("kl",)),
            },
        ),
    },
)
