"""What is measured of a rule: losses, use, continuations, exact answers."""

import pytest
import torch
from evaluation_factory import make_subject, routed
from reference_factory import make_model, make_windows

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.evaluation.generation import (
    agreed_share,
    greedy_continuations,
    right_answers,
)
from sglang_alloc.evaluation.material import domains_in_turn
from sglang_alloc.evaluation.questions import (
    KNOWN_LETTERS,
    PROMPT_BYTES,
    TEXT_TASKS,
    Question,
    questions_of,
)
from sglang_alloc.evaluation.step_rules import by_step, switched
from sglang_alloc.evaluation.text_measures import full_log_probabilities, measure_text
from sglang_alloc.evaluation.usage import UsageCounter
from sglang_alloc.reference.allocations import layer_allocation, token_allocation
from sglang_alloc.reference.exact_tasks import TASKS
from sglang_alloc.reference.heldout import token_losses
from sglang_alloc.reference.union_sets import union_allocation
from sglang_alloc_kernels.score_threshold import score_threshold_torch
from sglang_alloc_kernels.union_selection import opened_selection_torch


def test_the_full_model_agrees_with_itself_and_its_loss_is_the_held_out_loss() -> None:
    model, windows = make_model(), make_windows()
    full = full_log_probabilities(model, windows)
    found = measure_text(model, None, windows, full)
    assert torch.equal(found.agreement, torch.ones(len(windows), dtype=torch.float64))
    assert found.kl.abs().max() < 1e-6
    torch.testing.assert_close(found.nll.float(), token_losses(model, windows).mean(1))
    assert found.usage.mean_k == model.config.top_k


def test_a_reduced_rule_diverges_from_the_full_model() -> None:
    model, windows = make_model(), make_windows()
    full = full_log_probabilities(model, windows)
    found = measure_text(model, layer_allocation([1, 1]), windows, full)
    assert (found.kl > 0).all()
    assert found.usage.mean_k == 1


def test_distinct_experts_are_those_of_the_rows_at_one_position() -> None:
    model = make_model()
    counter = UsageCounter(None, model.config, (2, 4, 8))
    counter.rows = 4
    ids = torch.tensor([[0, 1], [2, 3], [0, 1], [4, 5], [0, 2], [6, 7], [0, 3], [6, 5]])
    counter(0, torch.zeros(8, 1), ids, torch.ones(8, 2))  # 4 rows of 2 positions
    # Rows 0 and 1 at position 0: {0, 1}; at 1: {2, 3, 4, 5}. Rows 2 and 3: {0, 2, 3}, {5, 6, 7}.
    usage = counter.usage()
    assert usage.distinct_experts == {2: (2 + 4 + 3 + 3) / 4, 4: (4 + 6) / 2}


def test_dropped_slots_use_no_expert() -> None:
    model = make_model()
    counter = UsageCounter(layer_allocation([1]), model.config, (1,))
    counter(0, torch.zeros(3, 1), torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor(
        [[0.9, 0.1]] * 3))  # fmt: skip
    assert counter.usage() == (1.0, {1: 1.0})


def test_greedy_continuations_are_those_of_whole_passes() -> None:
    model, prompts = make_model("olmoe"), make_windows()[:, :20]
    rule = layer_allocation([2, 1])
    found = greedy_continuations(model, prompts, 6, rule)
    tokens = prompts
    for _ in range(6):
        with torch.no_grad():
            following = model(tokens, rule).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    assert torch.equal(found, tokens[:, 20:])


def test_prefill_and_decode_can_have_rules_of_their_own() -> None:
    model, prompts = make_model(), make_windows()[:, :20]
    reduced = layer_allocation([1, 1])
    full = greedy_continuations(model, prompts, 8, None)
    decode_only = greedy_continuations(model, prompts, 8, None, reduced)
    assert torch.equal(decode_only[:, 0], full[:, 0])
    assert not torch.equal(greedy_continuations(model, prompts, 8, reduced), full)


def test_agreement_ends_at_the_first_difference() -> None:
    full = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    found = torch.tensor([[1, 2, 9, 4], [9, 2, 3, 4]])
    assert agreed_share(found, full).tolist() == [0.5, 0.0]


@pytest.mark.parametrize("task", [*TEXT_TASKS, *TASKS])
def test_questions_are_of_one_length_and_different(task: str) -> None:
    questions = questions_of(task, 40)
    assert questions == questions_of(task, 40)
    assert len({question.prompt for question in questions}) == 40
    assert {len(question.prompt) for question in questions} == {PROMPT_BYTES}
    assert all(question.answer for question in questions)


def test_a_word_is_asked_for_by_its_first_letters() -> None:
    for question in questions_of("word", 40):
        assert question.prompt[-KNOWN_LETTERS:].isalpha()
        assert question.answer.isalpha()


@pytest.mark.parametrize(
    ("found", "right"), [(b"ing.", True), (b"ing ", True), (b"ings", False), (b"int.", False)]
)
def test_an_answer_is_right_to_the_last_byte_and_ends_there(found: bytes, right: bool) -> None:
    assert Question("word", b"", b"ing", b"abcs").is_answered_by(found) == right


def test_right_answers_are_what_the_model_would_say() -> None:
    model = make_model()
    prompt = make_windows()[0, :16]
    said = bytes(greedy_continuations(model, prompt[None], 3, None)[0].tolist())
    asked = [Question("x", bytes(prompt.tolist()), answer) for answer in (said, said[::-1] + b"?")]
    assert right_answers(model, asked, None).tolist() == [1.0, 0.0]


def test_a_rule_by_step_sees_the_rows_of_one_position() -> None:
    x, ids, weights = routed(tokens=12)  # 3 rows of 4 positions
    found = by_step(token_allocation([2]), 4)(0, x, ids, weights)
    alone = token_allocation([2])(0, x[1::4], ids[1::4], weights[1::4])
    assert torch.equal(found[1::4], alone)


def test_union_rule_is_the_serving_kernels_rule() -> None:
    x, ids, weights = routed(tokens=12)
    saliency = torch.rand(1, 8, generator=torch.Generator().manual_seed(3))
    threshold = float((weights * saliency[0][ids]).median())
    found = union_allocation([threshold], saliency, 3, 4)(0, x, ids, weights)
    for step in range(4):
        rows = slice(step, None, 4)
        scores = weights[rows] * saliency[0][ids[rows]]
        opening = score_threshold_torch(scores, threshold)
        kept = opened_selection_torch(scores, ids[rows], opening, 8)
        assert torch.equal(found[rows] != 0, kept)


def test_a_switched_rule_follows_each_on_its_side() -> None:
    x, ids, weights = routed(tokens=12)
    found = switched(layer_allocation([1]), None, at=3, steps=4)(0, x, ids, weights)
    assert (found != 0).sum(1).view(3, 4).tolist() == [[1, 1, 1, 4]] * 3


def test_positions_before_a_switch_do_not_see_it() -> None:
    windows = make_windows()
    with make_subject() as subject, torch.no_grad():
        rule = switched(layer_allocation([1, 1]), None, at=30, steps=48)
        found = subject.model(windows[:, :-1], rule).logits
        stayed = subject.model(windows[:, :-1], layer_allocation([1, 1])).logits
        full = subject.model(windows[:, :-1]).logits
    torch.testing.assert_close(found[:, :30], stayed[:, :30])
    assert not torch.allclose(found[:, 30:], full[:, 30:], atol=1e-4)  # keys of reduced tokens


@pytest.mark.parametrize(
    ("count", "window_tokens", "named"), [(3, 50_000, "domain docs"), (5_000, 512, "5000 windows")]
)
def test_text_that_is_too_short_is_refused(count: int, window_tokens: int, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        domains_in_turn("heldout", count, window_tokens)
