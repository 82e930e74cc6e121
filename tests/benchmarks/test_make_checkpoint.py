"""The random checkpoints are checkpoints: transformers loads them whole, and names decide the numbers."""

import pytest
import torch
import transformers

from benchmarks.make_checkpoint import make_checkpoint, model_of_shape
from vz_edge.host.families import spec_from_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for part in ("all", "decoder"):
        make_checkpoint(model_of_shape("tiny"), root / part, part)
    return root


def test_transformers_finds_every_tensor(folders):
    for part, kind in (("all", "LlavaNextForConditionalGeneration"), ("decoder", "LlamaForCausalLM")):
        _, info = getattr(transformers, kind).from_pretrained(folders / part, output_loading_info=True)
        assert not any(info.values()), info


def test_the_decoder_alone_has_the_same_numbers(folders):
    whole = transformers.LlavaNextForConditionalGeneration.from_pretrained(folders / "all")
    alone = transformers.LlamaForCausalLM.from_pretrained(folders / "decoder")
    inside = whole.model.language_model.state_dict()
    assert all(torch.equal(inside[name], value) for name, value in alone.model.state_dict().items())
    assert 0.9 < alone.lm_head.weight.float().std() * 256**0.5 < 1.1


def test_the_config_says_the_shape_that_was_asked_for(folders):
    config = transformers.AutoConfig.from_pretrained(folders / "all").to_dict()
    assert spec_from_config(config) == model_of_shape("tiny")


def test_the_tokenizer_gives_back_any_text(folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "all")
    text = "left of <image> é 猫"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(model_of_shape("tiny").image_token_id) == 1
    assert tokenizer.decode(ids) == text
