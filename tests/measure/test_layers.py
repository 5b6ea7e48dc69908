"""States that are run block by block: the scores of whole models, and nothing that is kept is computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.measure import layers
from quant_fairness_plugin.measure.scoring import block_state, fixed_state, score_states
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.streamed import StreamedModel, open_streamed
from tests.measure.samples import make_texts

TEXTS = make_texts({"en": ["the quick brown fox", "jumps over", "a"], "he": ["השועל", "ש", "קופץ מעל הכלב"]})


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_scores_are_those_of_the_model_in_memory(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(layers, "STATES_IN_MEMORY", 3000)  # some batches in memory, others in files
    folder, other = tiny_model(family), tiny_model(family, dtype="bfloat16")
    whole, changed = load_model(str(folder)), load_model(str(other))
    expected = score_states(
        [fixed_state("a", whole.model), fixed_state("b", changed.model)], whole.tokenizer, TEXTS, batch_tokens=40
    )
    states = [block_state("a", open_streamed(str(folder))), block_state("b", open_streamed(str(other)))]
    steps: list[tuple[int, int]] = []
    found = score_states(states, whole.tokenizer, TEXTS, batch_tokens=40, progress=lambda *step: steps.append(step))
    assert steps == [(i + 1, steps[-1][1]) for i in range(steps[-1][1])]
    for name, state in expected.items():
        for language, own in state.languages.items():
            ours = found[name].languages[language]
            # float32 products in another order differ by about 1e-6.
            assert ours.nll_nats == pytest.approx(own.nll_nats, rel=1e-5)
            assert ours.kl_nats == pytest.approx(own.kl_nats, rel=1e-3, abs=1e-5)
            assert ours.flips == own.flips
    assert max(found["b"].languages["en"].kl_nats) > 0


def test_what_is_kept_is_not_run_again_and_not_taken_for_another_model(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    plain = StreamedModel.fetch
    monkeypatch.setattr(StreamedModel, "fetch", lambda self, layer: (fetched.append(layer), plain(self, layer))[1])

    def score(dtype: str) -> object:
        loaded = open_streamed(str(tiny_model("llama", dtype=dtype)))
        fetched.clear()
        return score_states([block_state("16 bit", loaded, kept=tmp_path)], loaded.tokenizer, TEXTS, batch_tokens=40)

    first = score("float16")
    assert fetched
    assert score("float16") == first
    assert not fetched
    assert score("bfloat16") != first
    assert fetched
    for stored in tmp_path.glob("*.stack"):
        content = stored.read_bytes()
        stored.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert score("float16") == first
    assert fetched  # what was altered is computed again


def test_a_soft_cap_and_a_factor_after_the_head_are_part_of_the_scores(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    from quant_fairness_plugin.model.rehearsal import model_logit_rule
    from tests.tiny import byte_tokenizer

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    rule = model_logit_rule(model, model.get_output_embeddings())
    assert rule is not None
    values = torch.tensor([-30.0, 0.5, 3.0])
    assert torch.allclose(rule(values), 2 * torch.tanh(values / 2))
    texts = make_texts({"en": ["the quick", "fox"]})
    found = score_states([fixed_state("16 bit", model)], byte_tokenizer(), texts)
    for index, sentence in enumerate(texts.sentences["en"]):
        ids = [0, *byte_tokenizer().encode(sentence)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        naive = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        assert found["16 bit"].languages["en"].nll_nats[index] == pytest.approx(naive, rel=1e-5)
