"""What layers are multiplied with: a layer at a time, as in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.tiny import make_checkpoint
from vz_edge.host import calibration
from vz_edge.host.calibration import calibration_bytes, calibration_embeds, input_squares
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.families import spec_from_config


@pytest.mark.parametrize(
    ("decoder", "text"), [("llama", {}), ("qwen2", {}), ("mistral", {}), ("llama", {"tie_word_embeddings": True})]
)
def test_squares_are_those_of_the_whole_model(tmp_path: Path, decoder: Any, text: dict[str, Any]) -> None:
    model: Any = make_checkpoint(tmp_path, decoder=decoder, text=text)
    checkpoint = Checkpoint.open(tmp_path)
    spec = spec_from_config(checkpoint.config)
    embeds = torch.randn(1, 30, spec.decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    expected: dict[str, torch.Tensor] = {}

    def remember(name: str, inputs: torch.Tensor) -> None:
        expected[name] = inputs[0].square().mean(0)

    language_model = model.model.language_model
    for name, module in language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: remember(f"language_model.{name}.weight", args[0])
            )
    with torch.no_grad():
        normed = language_model(inputs_embeds=embeds).last_hidden_state
    remember("language_model.embed_tokens.weight" if text else "lm_head.weight", normed)
    seen_bytes: list[int] = []
    found = input_squares(checkpoint, spec, embeds, lambda _, size_bytes: seen_bytes.append(size_bytes))
    assert found.keys() == expected.keys() and len(found) == 7 * spec.decoder.layers + 1
    for name, squares in found.items():
        torch.testing.assert_close(squares, expected[name], rtol=1e-3, atol=1e-6)
    assert sum(seen_bytes) == calibration_bytes(spec.decoder)


def test_a_picture_is_read_after_the_start_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TEXT_TOKENS", 9)
    monkeypatch.setattr(calibration, "PICTURE_TOKENS", 4)
    model: Any = make_checkpoint(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    checkpoint = Checkpoint.open(tmp_path)
    spec = spec_from_config(checkpoint.config)
    width = spec.tower.hidden_size
    patches = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0))
    embeds = calibration_embeds(checkpoint, spec, tokenizer, patches)
    table = model.model.language_model.embed_tokens.weight.detach()
    ids = tokenizer.encode(calibration.TEXT.read_text(encoding="utf-8")).ids[:9]
    with torch.no_grad():
        picture = model.model.multi_modal_projector(patches.flatten(0, 1)[[0, 4, 8, 12]])
    torch.testing.assert_close(embeds, torch.cat([table[ids[:1]], picture, table[ids[1:]]])[None])
