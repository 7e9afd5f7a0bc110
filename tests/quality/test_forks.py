"""The decoder over the harness's attention: the same as elsewhere when nothing is missing, and exactly what is missing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from bench.quality.attention import Evicted, Fork, Prefilled, Rows, Selected, Whole
from bench.quality.policies import POLICIES, Policy, RandomEviction, RandomSelection, RecentWindow, Streaming, index_of
from bench.quality.subject import Subject, Turn

kinds = pytest.mark.parametrize("kind", POLICIES.values(), ids=POLICIES)
EVICTORS = (RandomEviction, RecentWindow, Streaming)


def test_full_attention_has_the_logits_of_transformers(folder: Path, subject: Subject, turns: list[Turn]) -> None:
    ids = torch.randint(3, 1536, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    context = subject.prefill(ids, "")
    answered = subject.ask(context, Whole(context), turns)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for number, turn in enumerate(turns):
        with torch.inference_mode():
            wanted = oracle(torch.tensor([[*ids, *turn.prompt, *turn.answer[:-1]]])).logits[0, -len(turn.answer):]
        assert (answered.logits[answered.turn == number] - wanted).abs().max() < 1e-4


@kinds
def test_a_budget_of_everything_is_full_attention_bit_for_bit(
    kind: Callable[[], Policy], subject: Subject, context: Prefilled, turns: list[Turn],
) -> None:
    full = subject.ask(context, Whole(context), turns)
    assert torch.equal(subject.ask(context, kind().keep(context, context.length, None), turns).logits, full.logits)


@kinds
@pytest.mark.parametrize("tokens", [1, 5, 30, 60])
def test_a_policy_keeps_as_many_as_it_may_and_says_what_they_cost(
    kind: Callable[[], Policy], tokens: int, context: Prefilled,
) -> None:
    fork = kind().keep(context, tokens, None)
    if isinstance(fork, Whole):
        assert fork.device_bytes == context.num_bytes
        return
    heads, row = 3 * 2, 2 * 16 * 4                                       # layers * kv heads; a key and a value of float32
    assert fork.device_bytes == heads * tokens * (row + 4)               # and the place of each
    assert fork.host_bytes == (context.num_bytes if isinstance(fork, Selected) else 0)
    q, one = torch.zeros((1, 2, 16)), Rows(torch.tensor([70]), torch.tensor([0]))
    for layer in range(3):
        for head in range(2):
            keys, values, bias = fork.read(layer, head, q, one)
            assert keys.shape == values.shape == (tokens, 16) and bias is None


def test_what_the_controls_keep(context: Prefilled) -> None:
    kept = {kind: kind().keep(context, 8, None).index[1][0].tolist() for kind in EVICTORS}
    assert kept[RecentWindow] == list(range(53, 61))
    assert kept[Streaming] == [0, 1, 2, 3, 57, 58, 59, 60]
    assert sorted(set(kept[RandomEviction])) == kept[RandomEviction]
    random = RandomEviction().keep(context, 8, None)
    assert len({tuple(kept.tolist()) for layer in random.index for kept in layer}) == 6, "every layer and head has its own"
    more = RandomEviction().keep(context, 20, None)
    assert set(random.index[2][1].tolist()) < set(more.index[2][1].tolist()), "a smaller budget keeps a part of a larger one"


def test_random_selection_draws_anew_for_each_token_and_the_same_again(context: Prefilled) -> None:
    fork = RandomSelection().keep(context, 8, None)
    rows = Rows(torch.tensor([61, 62, 61]), torch.tensor([0, 0, 1]))
    drawn = [fork.read(0, 0, torch.zeros((3, 2, 16)), rows)[2] for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1]) and (drawn[0] == 0).sum(1).tolist() == [8, 8, 8]
    assert len({tuple(row.tolist()) for row in drawn[0]}) == 3


def test_a_selector_that_takes_more_than_its_budget_is_caught(subject: Subject, context: Prefilled, turns: list[Turn]) -> None:
    fork = Selected(context, 8, lambda layer, head, q, rows: torch.arange(context.length).expand(len(q), -1) < 9)
    with pytest.raises(ValueError, match=r"9 rows .* budget is 8"):
        subject.ask(context, fork, turns)


@kinds
def test_forks_do_not_disturb_each_other(
    kind: Callable[[], Policy], subject: Subject, context: Prefilled, turns: list[Turn],
) -> None:
    before = [each.clone() for each in [*context.keys, *context.values, *context.queries]]
    fork, other = kind().keep(context, 9, None), Whole(context)
    first = subject.ask(context, fork, turns).logits
    whole = subject.ask(context, other, turns).logits
    subject.decode(context, kind().keep(context, 20, None), turns[0].prompt, 4)
    subject.decode(context, fork, turns[0].prompt, 4)
    assert torch.equal(subject.ask(context, fork, turns).logits, first)
    assert torch.equal(subject.ask(context, other, turns).logits, whole)
    assert all(torch.equal(*pair) for pair in zip(before, [*context.keys, *context.values, *context.queries], strict=True))


@kinds
def test_a_question_is_answered_alone_as_among_others(
    kind: Callable[[], Policy], subject: Subject, context: Prefilled, turns: list[Turn],
) -> None:
    fork = kind().keep(context, 12, None)
    together = subject.ask(context, fork, turns)
    for number, turn in enumerate(turns):
        alone = subject.ask(context, fork, [turn], number)
        assert (together.logits[together.turn == number] - alone.logits).abs().max() < 1e-4


@kinds
def test_an_answer_given_at_once_is_right_when_decoding_says_it(
    kind: Callable[[], Policy], subject: Subject, context: Prefilled, turns: list[Turn],
) -> None:
    fork = kind().keep(context, 12, None)
    said, _ = subject.decode(context, fork, turns[0].prompt, 6)
    answered = subject.ask(context, fork, [Turn(turns[0].prompt, said)])
    assert answered.logits.argmax(-1).tolist() == said


def test_a_policy_that_keeps_one_wrong_token_is_seen(subject: Subject, context: Prefilled, turns: list[Turn]) -> None:
    """Everything but one place of one head of one layer, which holds its neighbour: no longer full attention."""
    right = index_of(context, lambda layer, head: torch.arange(context.length))
    full = subject.ask(context, Whole(context), turns).logits
    for place in (3, 30, 59):
        wrong = [[kept.clone() for kept in layer] for layer in right]
        wrong[1][1][place] = place + 1
        assert (subject.ask(context, Evicted(context, wrong), turns).logits - full).abs().max() > 1e-5


def test_heads_may_hold_different_numbers(subject: Subject, context: Prefilled, turns: list[Turn]) -> None:
    """What a head does not hold weighs nothing: the same as hiding it."""
    index = index_of(context, lambda layer, head: torch.arange(layer + head, context.length, 2 + head))

    class Hidden:
        device_bytes = host_bytes = 0

        def read(self, layer: int, head: int, q: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            bias = torch.full((1, context.length), float("-inf"))
            bias[0, index[layer][head]] = 0.0
            return context.keys[layer][head], context.values[layer][head], bias

    forks: list[Fork] = [Evicted(context, index), Hidden()]
    ragged, hidden = (subject.ask(context, fork, turns).logits for fork in forks)
    assert (ragged - hidden).abs().max() < 1e-4
