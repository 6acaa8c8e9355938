"""forks: where branches depart, how long they differ, and what they answer."""

from __future__ import annotations

from oki_trace.analysis.question import Column, Drawing, Option, Question, View

_REPLY = Column("reply", "name", "the reply that is departed from")
_STEP = Column("step", "number", "the step at which it is departed from")

FORKS = Question(
    "forks",
    "Branches",
    "Branches and their answers",
    "Where branches depart from a reply, how long they differ from it, and what they answer.",
    "A branch and its reply agree again at the first three tokens in a row that both have after "
    "the fork, in the same place or not, or at fewer if both end with them. The logprob of a "
    "branch is that of all its tokens after the fork, whoever chose them.",
    {
        "branch": View(
            """
WITH scope AS ($scope),
branches AS (
  SELECT message.* FROM message JOIN scope ON message.id = scope.message_id
  WHERE branch_of IS NOT NULL
),
own AS (
  SELECT branches.id AS branch, list(token_id ORDER BY step_index) AS ids,
    arg_min(token, step_index) AS token, arg_min(prob, step_index) AS prob,
    sum(logprob) AS logprob
  FROM branches JOIN step ON step.message_id = branches.id AND step_index IS NOT NULL
  GROUP BY branches.id
),
left_behind AS (
  SELECT branches.id AS branch, list(token_id ORDER BY step_index) AS ids,
    arg_min(token, step_index) AS token, arg_min(prob, step_index) AS prob
  FROM branches
  JOIN step ON step.message_id = branches.branch_of AND step_index >= branches.branch_step
  GROUP BY branches.id
),
own_three AS (
  SELECT branch, n AS place, list_concat(ids, [-1, -2])[n:n + 2] AS three
  FROM own, generate_series(1, len(ids)) AS series(n)
),
left_three AS (
  SELECT branch, n AS place, list_concat(ids, [-1, -2])[n:n + 2] AS three
  FROM left_behind, generate_series(1, len(ids)) AS series(n)
),
meeting AS (
  SELECT branch, min({'own': own_three.place, 'of_reply': left_three.place}) AS place
  FROM own_three JOIN left_three USING (branch, three)
  GROUP BY branch
),
after_meeting AS (
  SELECT branch, place, own.ids[place.own:] AS ids, left_behind.ids[place.of_reply:] AS left_ids
  FROM meeting JOIN own USING (branch) JOIN left_behind USING (branch)
),
agreement AS (
  SELECT branch, any_value(place) AS place,
    coalesce(min(n) FILTER (ids[n] != left_ids[n]) - 1, max(n)) AS tokens
  FROM after_meeting, generate_series(1, least(len(ids), len(left_ids))) AS series(n)
  GROUP BY branch
)
SELECT conversation_id AS conversation, branch_of AS reply, branch_step AS step, id AS branch,
  left_behind.token AS left_token, left_behind.prob AS left_prob, own.token, own.prob,
  len(own.ids) AS tokens, coalesce(agreement.place.own - 1, len(own.ids)) AS apart,
  coalesce(agreement.place.of_reply - 1, len(left_behind.ids)) AS left_apart,
  coalesce(agreement.tokens, 0) AS agreed, logprob
FROM branches JOIN own ON own.branch = id
LEFT JOIN left_behind ON left_behind.branch = id
LEFT JOIN agreement ON agreement.branch = id
ORDER BY conversation, reply, step, logprob DESC, id
LIMIT $top
""",
            (
                Column("conversation", "name", "the conversation"),
                _REPLY,
                _STEP,
                Column("branch", "name", "the branch"),
                Column("left_token", "token", "the token of the reply", label="left"),
                Column("left_prob", "share", "its probability", label="its probability"),
                Column("token", "token", "the token of the branch"),
                Column("prob", "share", "its probability"),
                Column("tokens", "number", "tokens of the branch after the fork"),
                Column("apart", "number", "of these, tokens before they agree again"),
                Column("left_apart", "number", "tokens of the reply before they agree again"),
                Column("agreed", "number", "tokens that both then have in a row"),
                Column("logprob", "number", "of all tokens of the branch after the fork", "nats"),
            ),
            {"first token": Drawing("ranked", ("token", "branch"), ("prob",))},
        ),
        "answer": View(
            """
WITH scope AS ($scope),
branches AS (
  SELECT message.* FROM message JOIN scope ON message.id = scope.message_id
  WHERE branch_of IS NOT NULL
),
likelihood AS (
  SELECT branches.id AS branch, list(token_id ORDER BY step_index) AS ids, sum(logprob) AS logprob
  FROM branches JOIN step ON step.message_id = branches.id AND step_index IS NOT NULL
  GROUP BY branches.id
),
paths AS (
  SELECT branch_of AS reply, branch_step AS step, trim(content) AS answer,
    count(*) AS branches, exp(any_value(logprob)) AS probability
  FROM branches JOIN likelihood ON likelihood.branch = id
  GROUP BY reply, step, answer, ids
),
answers AS (
  SELECT reply, step, answer, sum(branches)::INTEGER AS branches, sum(probability) AS probability
  FROM paths GROUP BY reply, step, answer
)
SELECT reply, step, answer, branches,
  branches / sum(branches) OVER (PARTITION BY reply, step) AS share,
  ln(probability) AS logprob
FROM answers
ORDER BY reply, step, branches DESC, probability DESC, answer
LIMIT $top
""",
            (
                _REPLY,
                _STEP,
                Column("answer", "name", "the text of the branches"),
                Column("branches", "number", "branches with this text"),
                Column("share", "share", "share of the branches at this step"),
                Column(
                    "logprob",
                    "number",
                    "of all tokens after the fork; a path that several branches took counts once",
                    "nats",
                ),
            ),
            {"share": Drawing("ranked", ("answer", "step"), ("share",))},
        ),
    },
    {"top": Option(50, "Rows", "how many rows")},
)
