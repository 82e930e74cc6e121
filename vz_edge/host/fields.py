"""Every field that the files of a supported checkpoint can carry, and what the export does with it.

One table per kind of file, or per section of one. A field is

* **read**: the bundle does what it says, or the code that reads it refuses what cannot be done;
* **refused** with any value but those listed: another one would change answers, and nothing here does it;
* **without effect** on a bundle's answers, for the reason that its group has.

What is in no table is named in the export's notes and does not stop it: files carry fields of training scripts and of
hubs that nobody can list. The sources are transformers' own classes (a test walks their fields) and, for ``original``,
the LLaVA code (github.com/haotian-liu/LLaVA, llava/model and llava/mm_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vz_edge.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class Fields:
    """The fields of one section. ``refused``: by name, the values that are no reason to refuse; null never is one.

    ``what_to_do`` is said to who meets such a reason.
    """

    read: frozenset[str]
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    without_effect: Mapping[str, str] = field(default_factory=dict)
    what_to_do: str = ""

    def __contains__(self, name: object) -> bool:
        return name in self.read or name in self.refused or name in self.without_effect


def check_fields(section: str, values: Mapping[str, Any], where: str) -> list[str]:
    """The fields of ``values`` that no table has, as ``where: name``.

    Raises UnsupportedModelError for a value that is refused.
    """
    table = TABLES[section]
    for name, allowed in table.refused.items():
        value = values.get(name)
        if value is not None and not any(value == option and type(value) is type(option) for option in allowed):
            supported = f"supported: {allowed[0]!r}" if allowed else "leave it out"
            raise UnsupportedModelError(f"{where}: {name} {value!r} is not supported; {supported}{table.what_to_do}")
    return [f"{where}: {name}" for name in values if name not in table]


def check_config(config: Mapping[str, Any]) -> list[str]:
    """The fields of a config.json of transformers' LLaVA families that no table has.

    Raises UnsupportedModelError for a value that is refused, CheckpointError for a section that is none.
    """
    sections = {name: _section(config, name) for name in ("text_config", "vision_config")}
    tables = {
        "text_config": str(sections["text_config"].get("model_type", "llama")),
        "vision_config": str(sections["vision_config"].get("model_type", "clip_vision_model")),
    }
    unknown = check_fields(str(config.get("model_type")), config, "config.json")
    for name, table in tables.items():
        if table in TABLES:  # a decoder or tower without one is refused by its type
            unknown += check_fields(table, sections[name], f"config.json: {name}")
    return unknown


def check_original_config(config: Mapping[str, Any], decoder_type: str) -> list[str]:
    """The same of a config.json of the original code, whose decoder's fields are beside the others."""
    unknown = check_fields("original", config, "config.json")
    check_fields(decoder_type, config, "config.json")
    return [text for text in unknown if text.removeprefix("config.json: ") not in TABLES[decoder_type]]


def whole_number(name: str, value: Any, smallest: int = 1) -> int:
    """``value`` of config.json as an int. Raises CheckpointError where it is none, or is smaller than ``smallest``."""
    if type(value) is not int or value < smallest:
        raise CheckpointError(f"config.json: {name} is {value!r}; expected a whole number from {smallest}")
    return value


def positive(name: str, value: Any) -> float:
    """``value`` of config.json as a float. Raises CheckpointError where it is no number above 0."""
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise CheckpointError(f"config.json: {name} is {value!r}; expected a number above 0")
    return float(value)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json: {name} is {section!r}; expected an object")
    return section


def _group(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


_BOOKKEEPING = _group(
    "says where a file comes from",
    "_name_or_path _commit_hash architectures transformers_version auto_map torch_dtype dtype license name "
    "_attn_implementation_autoset _attn_implementation attn_implementation is_composition unsloth_version "
    "unsloth_fixed custom_pipelines base_model_tp_plan base_model_pp_plan",
)
_TRAINING = _group(
    "is for training",
    "attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob dropout resid_pdrop embd_pdrop "
    "initializer_range initializer_factor problem_type ignore_index gradient_checkpointing return_dict id2label "
    "label2id output_attentions output_hidden_states output_scores finetuning_task task_specific_params",
)
_RUNNING = _group(
    "says how transformers computes, not what",
    "use_cache pretraining_tp chunk_size_feed_forward pruned_heads torchscript use_bfloat16 tf_legacy_loss "
    "is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder "
    "_flash_attn_2_enabled",
)
# transformers before 4.50 wrote these into every section of config.json; generation_config.json is what is read.
_LEGACY_GENERATION = _group(
    "is read from generation_config.json",
    "bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix "
    "remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens temperature "
    "tokenizer_class top_k top_p typical_p",
)
_CONFIG = _BOOKKEEPING | _TRAINING | _RUNNING | _LEGACY_GENERATION
_TOKEN_IDS = _group("a template writes the token down", "bos_token_id pad_token_id")
_UNREAD_BY_FAMILY = "transformers' class does not read it"

_VLM_READ = (
    "model_type text_config vision_config image_token_index image_token_id projector_hidden_act "
    "vision_feature_select_strategy vision_feature_layer multimodal_projector_bias tie_word_embeddings eos_token_id "
    "quantization_config compression_config quantization"
)
_VLM_UNREAD = _group(
    "the sections and the weights say it",
    "image_seq_length vocab_size hidden_size image_size patch_size use_image_newline_parameter video_token_index "
    "video_token_id video_seq_length projection_dim",
)
_DECODER_READ = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act max_position_embeddings rms_norm_eps rope_parameters rope_theta rope_scaling partial_rotary_factor "
    "original_max_position_embeddings head_dim tie_word_embeddings eos_token_id quantization_config"
)
_WINDOW = "sliding_window use_sliding_window max_window_layers layer_types"
_IMAGE_READ = (
    "image_processor_type feature_extractor_type do_resize size do_center_crop crop_size resample do_rescale "
    "rescale_factor do_normalize image_mean image_std do_pad image_grid_pinpoints use_square_size default_to_square"
)

TABLES: dict[str, Fields] = {
    # config.json
    "llava": Fields(
        _names(_VLM_READ),
        without_effect=_CONFIG | _TOKEN_IDS | _VLM_UNREAD | _group("a picture is one tile", "image_grid_pinpoints"),
    ),
    "llava_next": Fields(
        _names(_VLM_READ + " image_grid_pinpoints"), without_effect=_CONFIG | _TOKEN_IDS | _VLM_UNREAD
    ),
    "clip_vision_model": Fields(
        _names(
            "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size "
            "patch_size hidden_act layer_norm_eps quantization_config"
        ),
        without_effect=_CONFIG
        | _TOKEN_IDS
        | _group("comes after the feature layer", "projection_dim vocab_size eos_token_id tie_word_embeddings")
        | _group("is CLIP's text side", "text_config text_config_dict vision_config_dict logit_scale_init_value"),
    ),
    "llama": Fields(
        _names(_DECODER_READ + " attention_bias mlp_bias"),
        without_effect=_CONFIG
        | _TOKEN_IDS
        | _group(_UNREAD_BY_FAMILY, _WINDOW + " rope_interleaved max_sequence_length"),
    ),
    "mistral": Fields(
        _names(_DECODER_READ + " sliding_window"),
        refused={"attention_bias": (False,), "mlp_bias": (False,)},
        without_effect=_CONFIG
        | _TOKEN_IDS
        | _group(_UNREAD_BY_FAMILY, "use_sliding_window max_window_layers layer_types"),
    ),
    "qwen2": Fields(
        _names(f"{_DECODER_READ} {_WINDOW}"),
        refused={"mlp_bias": (False,), "use_mrope": (False,)},
        without_effect=_CONFIG | _TOKEN_IDS | _group("q, k and v always have biases", "attention_bias"),
    ),
    # config.json of the original LLaVA code; the decoder's own fields are checked as the decoder's
    "original": Fields(
        _names(
            "model_type mm_vision_tower mm_vision_select_layer mm_vision_select_feature mm_projector_type "
            "image_aspect_ratio image_grid_pinpoints mm_patch_merge_type"
        ),
        refused={
            "mm_use_im_start_end": (False,),
            "mm_use_im_patch_token": (False,),
            "mm_resampler_type": (),
            "s2": (False,),
            "use_pos_skipping": (False,),
            "vision_tower_pretrained": ("",),
        },
        without_effect=_group(
            "is for training",
            "freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_mlp_adapter tune_mm_vision_resampler "
            "unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr mm_tunable_parts pretrain_mm_mlp_adapter "
            "pos_skipping_range tokenizer_padding_side tokenizer_model_max_length version use_mm_proj "
            "mm_use_im_patch_token_pretrained unfreeze_mm_mlp_adapter",
        )
        | _group("the weights say it", "mm_hidden_size")
        | _group("is read with image_aspect_ratio 'highres' alone", "image_crop_resolution image_split_resolution")
        | _group(
            "is for videos",
            "mm_spatial_pool_mode mm_spatial_pool_stride mm_spatial_pool_out_channels mm_newline_position "
            "add_faster_video faster_token_stride add_time_instruction force_sample",
        )
        | _group("s2 is off", "s2_scales"),
    ),
    # preprocessor_config.json, or the section image_processor of processor_config.json
    "image_processor": Fields(
        _names(_IMAGE_READ),
        refused={"pad_size": ()},
        without_effect=_BOOKKEEPING
        | _group("pictures are always converted to RGB, which the tower wants", "do_convert_rgb")
        | _group("says how transformers computes, not what", "device disable_grouping data_format input_data_format")
        | _group("is an argument of a call", "return_tensors _valid_processor_keys _valid_kwargs_names")
        | _group("says which class", "processor_class model_input_names")
        | _group("the model says how many tokens a picture has", "image_seq_length")
        | _group("is read by the original code alone", "aspect_ratio_setting"),
    ),
    # processor_config.json
    "processor": Fields(
        _names("image_processor chat_template"),
        refused={"image_token": ("<image>",)},
        without_effect=_BOOKKEEPING
        | _group("says which class", "processor_class")
        | _group(
            "the model says how many tokens a picture has",
            "num_additional_image_tokens image_seq_length patch_size vision_feature_select_strategy",
        )
        | _group("is no part of a question about a picture", "video_processor feature_extractor audio_tokenizer")
        | _group("has a file of its own", "tokenizer"),
    ),
    # generation_config.json
    "generation": Fields(
        _names("eos_token_id stop_strings"),
        refused={
            "repetition_penalty": (1.0, 1),
            "encoder_repetition_penalty": (1.0, 1),
            "no_repeat_ngram_size": (0,),
            "encoder_no_repeat_ngram_size": (0,),
            "bad_words_ids": (),
            "force_words_ids": (),
            "constraints": (),
            "sequence_bias": (),
            "suppress_tokens": ([],),
            "begin_suppress_tokens": ([],),
            "forced_bos_token_id": (),
            "forced_eos_token_id": (),
            "exponential_decay_length_penalty": (),
            "guidance_scale": (1.0, 1),
            "watermarking_config": (),
            "min_length": (0,),
            "min_new_tokens": (0,),
            "num_beams": (1,),
            "num_beam_groups": (1,),
            "penalty_alpha": (0.0, 0),
            "dola_layers": (),
            "token_healing": (False,),
        },
        what_to_do="; answers will be without it if you change the file",
        without_effect=_BOOKKEEPING
        | _group(
            "how an answer is drawn is said with the question; without a word it is greedy",
            "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff",
        )
        | _group("how long an answer may be is said with the question", "max_length max_new_tokens max_time")
        | _group("the template writes these tokens down", "bos_token_id pad_token_id decoder_start_token_id")
        | _group("is read with several beams alone", "length_penalty diversity_penalty early_stopping low_memory")
        | _group(
            "says how transformers computes or what it returns",
            "_from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
            "assistant_lookbehind cache_config cache_implementation compile_config continuous_batching_config "
            "disable_compile is_assistant max_cache_len max_matching_ngram_size num_assistant_tokens "
            "num_assistant_tokens_schedule num_return_sequences output_attentions output_hidden_states output_logits "
            "output_scores prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits "
            "return_dict_in_generate return_legacy_cache speculation_type target_lookbehind use_cache use_mtp "
            "transformers_version trust_remote_code",
        ),
    ),
    # tokenizer_config.json; the tokens and how text is cut are in tokenizer.json, which is taken over as it is
    "tokenizer": Fields(
        _names(
            "bos_token eos_token unk_token pad_token sep_token cls_token mask_token chat_template add_bos_token "
            "add_eos_token added_tokens_decoder"
        ),
        refused={"image_token": ("<image>",)},
        without_effect=_BOOKKEEPING
        | _group("says which class", "tokenizer_class processor_class backend is_local local_files_only")
        | _group(
            "is in tokenizer.json, which wins in transformers too",
            "additional_special_tokens extra_special_tokens model_specific_special_tokens legacy "
            "add_prefix_space sp_model_kwargs tokenizer_file vocab_file merges_file spaces_between_special_tokens "
            "do_lower_case use_default_system_prompt from_slow add_dummy_prefix_space split_special_tokens errors "
            "pretokenize_regex tokenizer_object fix_mistral_regex",
        )
        | _group(
            "is for batches and training",
            "model_max_length padding_side truncation_side max_length stride padding truncation truncation_strategy "
            "pad_to_multiple_of pad_token_type_id trust_remote_code",
        )
        | _group(
            "the answer's text is the tokens' own",
            "clean_up_tokenization_spaces model_input_names device_map special_tokens_map_file return_token_type_ids",
        ),
    ),
}
