from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.measure import streamed
from quant_fairness_plugin.measure.streamed import Head, score_hidden
from quant_fairness_plugin.model.devices import ByDevice

VOCABULARY, WIDTH, TOKENS, STATES = 1003, 33, 17, 5


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def naive(reference: Tensor, states: Tensor, targets: Tensor, own: Head, others: Head) -> tuple[Tensor, Tensor]:
    """The same in float64, with whole distributions."""

    def log_probabilities(hidden: Tensor, head: Head) -> Tensor:
        logits = hidden.double() @ head.weight.double().T
        return torch.log_softmax(logits if head.bias is None else logits + head.bias.double(), dim=-1)

    expected = log_probabilities(reference, own)
    rows = []
    for state in states:
        found = log_probabilities(state, others)
        nll = -found[torch.arange(TOKENS), targets]
        kl = (expected.exp() * (expected - found)).sum(1)
        rows.append(torch.stack([nll, kl, (found.argmax(1) != expected.argmax(1)).double()], dim=1))
    return -expected[torch.arange(TOKENS), targets], torch.stack(rows)


@pytest.mark.parametrize(("elements", "columns"), [(1, 1), (700, 100), (700, 9999), (1 << 23, 1 << 11)])
@pytest.mark.parametrize("biased", [False, True])
def test_scores_are_those_of_whole_distributions(
    draw: torch.Generator, monkeypatch: pytest.MonkeyPatch, elements: int, columns: int, biased: bool
) -> None:
    monkeypatch.setattr(streamed, "PIECE_ELEMENTS", ByDevice(cpu=elements, accelerator=0))
    monkeypatch.setattr(streamed, "SLICE_COLUMNS", ByDevice(cpu=columns, accelerator=0))
    head = Head(
        torch.randn(VOCABULARY, WIDTH, generator=draw), torch.randn(VOCABULARY, generator=draw) if biased else None
    )
    reference = torch.randn(TOKENS, WIDTH, generator=draw)
    states = reference + 0.1 * torch.randn(STATES, TOKENS, WIDTH, generator=draw)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    nll, scores = score_hidden(reference, states, targets, head)
    expected_nll, expected = naive(reference, states, targets, head, head)
    # float32 logits of magnitude about 20 carry errors of 1e-6 each
    torch.testing.assert_close(nll, expected_nll, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected[..., 2].sum() > 0


def test_states_may_have_another_head(draw: torch.Generator) -> None:
    head = Head(torch.randn(VOCABULARY, WIDTH, generator=draw), None)
    other = Head(head.weight + 0.1 * torch.randn(VOCABULARY, WIDTH, generator=draw), None)
    reference = torch.randn(TOKENS, WIDTH, generator=draw)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    _, scores = score_hidden(reference, reference[None], targets, head, state_head=other)
    torch.testing.assert_close(scores, naive(reference, reference[None], targets, head, other)[1], rtol=0, atol=1e-5)
    assert scores[..., 1].min() > 0


def test_the_same_state_has_no_kl(draw: torch.Generator) -> None:
    head = Head(torch.randn(VOCABULARY, WIDTH, generator=draw), None)
    reference = torch.randn(TOKENS, WIDTH, generator=draw)
    _, scores = score_hidden(reference, reference[None], torch.zeros(TOKENS, dtype=torch.long), head)
    assert scores[..., 1].max() < 1e-6
    assert scores[..., 2].sum() == 0


def test_huge_logits_do_not_overflow(draw: torch.Generator) -> None:
    head = Head(1e4 * torch.randn(VOCABULARY, WIDTH, generator=draw), None)
    reference = torch.randn(TOKENS, WIDTH, generator=draw)
    _, scores = score_hidden(reference, reference[None] * 0.5, torch.zeros(TOKENS, dtype=torch.long), head)
    assert torch.isfinite(scores).all()
