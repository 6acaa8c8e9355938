"""Where answers form, and what the layers did on the way: the Logit Lens over many steps."""

from __future__ import annotations

from oki_trace.analysis.questions import Picture, Question, View, columns

_OF_SETTLED = """
steps number steps
settled share steps whose token comes to stay on top: 1 when greedy
layer number mean layer from which it stays
depth share the same as a share of the model's depth
at_last share settled only in the last layer
prob_there share mean probability of the token at that layer
prob share mean probability in the end
"""

_SETTLED = """
  count(*) AS steps,
  avg((settle_layer IS NOT NULL)::INT) AS settled,
  avg(settle_layer) AS layer,
  avg(settle_layer / layers) AS depth,
  avg((settle_layer = layers)::INT) AS at_last,
  avg(settle_prob) AS prob_there,
  avg(prob) AS prob
FROM step JOIN scope USING (message_id)
WHERE layers IS NOT NULL
"""

SETTLE = Question(
    "settle",
    "Where answers form: the first layer from which the token that was said stays on top.",
    "A token that settles early was clear from the context long before the end; one that "
    "settles in the last layer was still contested there. The lens reads early layers badly: "
    "a token may have been settled before it shows.",
    {
        "layer": View(
            """
SELECT model_id AS model, settle_layer AS layer, count(*) AS steps,
  count(*) / sum(count(*)) OVER (PARTITION BY model_id) AS share,
  sum(count(*)) OVER so_far / sum(count(*)) OVER (PARTITION BY model_id) AS cumulative_share,
  avg(settle_prob) AS prob_there
FROM step JOIN scope USING (message_id)
WHERE layers IS NOT NULL
GROUP BY model_id, settle_layer
WINDOW so_far AS (PARTITION BY model_id ORDER BY settle_layer NULLS LAST)
ORDER BY model, layer NULLS LAST
""",
            columns("""
model name the model
layer number first layer from which the token stays on top; none: it never does
steps number steps
share share of the model's steps
cumulative_share share of the model's steps that have settled by this layer
prob_there share mean probability of the token at this layer
"""),
            Picture("layer", ("share",)),
        ),
        "model": View(
            "\nSELECT model_id AS model, any_value(layers) AS layers,"
            + _SETTLED
            + "GROUP BY model_id\nORDER BY model\n",
            columns("model name the model\nlayers number its last layer" + _OF_SETTLED),
            Picture("model", ("depth", "at_last")),
        ),
        "position": View(
            """
SELECT
  CASE WHEN step_index < 2 THEN step_index ELSE (2 ** floor(log2(step_index)))::INT END AS first,"""
            + _SETTLED
            + "GROUP BY first\nORDER BY first\n",
            columns(
                "first number steps of the reply from this one on, up to the next row's"
                + _OF_SETTLED
            ),
            Picture("first", ("depth", "at_last")),
        ),
        "class": View(
            "\nSELECT token_class AS class," + _SETTLED + "GROUP BY class\nORDER BY depth DESC\n",
            columns("class name kind of token" + _OF_SETTLED),
            Picture("class", ("depth", "at_last")),
        ),
    },
)

LAYERS = Question(
    "layers",
    "What the layers did: how far each agrees with the token that was said and with the end.",
    "Agreement is how often the token said is the layer's first; entropy how undecided the "
    "layer is; kl how far its distribution is from the final one, in nats.",
    {
        "layer": View(
            """
SELECT model_id AS model, layer, count(*) AS steps,
  avg((chosen_rank = 1)::INT) AS agreement,
  avg(chosen_prob) AS chosen_prob,
  avg(entropy) AS entropy,
  avg(kl) AS kl
FROM lens_layer JOIN scope USING (message_id)
GROUP BY model_id, layer
ORDER BY model, layer
""",
            columns("""
model name the model
layer number 0: the embedding; the last: the model's own distribution
steps number steps
agreement share steps where the token said is the layer's first
chosen_prob share mean probability of that token at the layer
entropy number mean entropy of the layer's distribution, in nats
kl number mean KL(final distribution ‖ layer's), in nats
"""),
            Picture("layer", ("agreement",)),
        ),
    },
)

RIVALS = Question(
    "rivals",
    "Steps where a middle layer held a confident other answer.",
    "The layer, read as if it were the last, gives at least that probability to another token "
    "than the one said. In between, the model changed its mind, or worked with a word that it "
    "was never to say.",
    {
        "step": View(
            """,
rivals AS (
  SELECT step_id, arg_max(layer, top_prob) AS layer, arg_max(top_token, top_prob) AS held,
    max(top_prob) AS held_prob, count(*) AS layers_held
  FROM lens_layer JOIN scope USING (message_id)
  WHERE top_prob >= $least AND chosen_rank > 1 AND layer >= $from_layer
  GROUP BY step_id
  ORDER BY held_prob DESC, step_id
  LIMIT $top
)
SELECT conversation_id AS conversation, message_id AS message, step_index AS step, rivals.layer,
  held, held_prob, token AS chosen, prob, layers_held AS layers
FROM rivals JOIN step ON step.id = rivals.step_id JOIN message ON message.id = message_id
ORDER BY held_prob DESC, step.id
""",
            columns("""
conversation name the conversation
message name the reply
step name the step
layer number where the other answer was held most firmly
held token the other answer
held_prob share its probability there
chosen token what was said in the end
prob share its probability in the end
layers number how many layers held another answer so firmly
"""),
            Picture("step", ("held_prob",)),
        ),
        "layer": View(
            """
SELECT model_id AS model, layer, count(*) AS steps,
  avg((chosen_rank > 1 AND top_prob >= $least)::INT) AS share
FROM lens_layer JOIN scope USING (message_id)
WHERE layer >= $from_layer
GROUP BY model_id, layer
ORDER BY model, layer
""",
            columns("""
model name the model
layer number the layer
steps number steps
share share of them where the layer held another answer
"""),
            Picture("layer", ("share",)),
        ),
    },
    {
        "least": (0.5, "the least probability of the other answer"),
        "from_layer": (2, "the first layer looked at: the embedding mostly repeats its input"),
        "top": (20, "how many steps"),
    },
)
