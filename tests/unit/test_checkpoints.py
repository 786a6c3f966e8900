"""Checkpoints that do not fit are refused before anything is loaded, in words that say what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny_models
from whiflash_sglang.core.errors import CheckpointError
from whiflash_sglang.startup import hub
from whiflash_sglang.startup import supported_targets as targets
from whiflash_sglang.startup.checkpoints import (
    DrafterSpec,
    TargetSpec,
    check_ranks,
    check_weights,
    load_drafter_spec,
    load_target_spec,
)

FLAGS = {"df": "--speculative-draft-model-path", "e3": "--whiflash-eagle-draft"}
FOLDERS = {"df": "dflash", "e3": "eagle3"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.build(folder)
    return folder


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "models"))


def edit_config(folder: Path, **changes: object) -> None:
    """Set fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(models: Path, kind: str) -> DrafterSpec:
    return load_drafter_spec(str(models / FOLDERS[kind]), kind, load_target_spec(str(models / "target")))


def refusal(models: Path, kind: str) -> str:
    with pytest.raises(CheckpointError) as error:
        load(models, kind)
    message = str(error.value)
    assert message.startswith(f"{FLAGS[kind]} {models / FOLDERS[kind]}")
    assert "; " in message and "\n" not in message
    return message


def test_fitting_checkpoints_are_read(tiny: Path) -> None:
    assert load_target_spec(str(tiny / "target")) == TargetSpec(str(tiny / "target"), 64, 512, 4, 2, 16)
    dflash, eagle3 = load(tiny, "df"), load(tiny, "e3")
    assert (dflash.layer_ids, dflash.block_size, dflash.mask_token_id, dflash.num_layers) == ((0, 2), 8, 7, 2)
    assert (dflash.hidden_size, dflash.draft_vocab_size, dflash.num_kv_heads, dflash.head_dim) == (64, 512, 2, 16)
    assert (eagle3.layer_ids, eagle3.draft_vocab_size, eagle3.vocab_size) == ((0, 1, 2), 256, 512)
    assert (eagle3.block_size, eagle3.mask_token_id, eagle3.num_layers) == (None, None, 1)


def test_layer_ids_keep_the_drafters_own_order(models: Path) -> None:
    edit_config(models / "dflash", dflash_config={"mask_token_id": 7, "target_layer_ids": [2, 0]})
    assert load(models, "df").layer_ids == (2, 0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_target_that_is_accepted_is_one_that_is_served_in_tests(tmp_path: Path, family: str) -> None:
    """tests/e2e/test_targets.py serves the families of `tiny_models`; the others are refused."""
    target = load_target_spec(str(tiny_models.build(tmp_path, family=family).target))
    assert (target.hidden_size, target.num_layers) == (64, 4)
    served = [name for config in tiny_models.FAMILIES.values() for name in config["architectures"]]
    assert sorted(served) == sorted(targets.TARGETS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["Qwen3VLForConditionalGeneration"]}, "a multimodal or vision-language model"),
        ({"vision_config": {"depth": 2}}, "a multimodal or vision-language model"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "multimodal"),
        ({"architectures": ["BertModel"]}, "an encoder, classifier or embedding model"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "an encoder, classifier or embedding model"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512}, "multi-head latent attention (MLA)"),
        ({"architectures": ["MambaForCausalLM"], "state_size": 16}, "a hybrid or Mamba model"),
        ({"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M-M*"}, "a hybrid or Mamba model"),
        ({"architectures": ["Qwen3NextForCausalLM"], "full_attention_interval": 4}, "a hybrid or Mamba model"),
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, "a hybrid with linear attention"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, "a model with sliding-window layers"),
        (
            {
                "architectures": ["Qwen3_5ForConditionalGeneration"],
                "text_config": {"layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 4},
            },
            "a hybrid or Mamba model, whose recurrent state cannot roll back a rejected draft (and a multimodal",
        ),
        (
            {"architectures": ["GptOssForCausalLM"], "layer_types": ["sliding_attention", "full_attention"] * 2},
            "['GptOssForCausalLM'], a model with sliding-window layers, whose KV is in separate pools",
        ),
        ({"use_sliding_window": True}, "a model with sliding-window layers"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "['Qwen2ForCausalLM'], which has not been tested as a target"),
        ({"architectures": None}, "architectures is [], which has not been tested as a target"),
    ],
)
def test_targets_that_are_not_served(models: Path, changes: dict, said: str) -> None:
    edit_config(models / "target", **changes)
    with pytest.raises(CheckpointError) as error:
        load_target_spec(str(models / "target"))
    message = str(error.value)
    assert message.startswith(f"--model-path {models / 'target'}: ") and "\n" not in message
    assert said in message
    assert message.endswith("or this one with --whiflash-router off")


def test_eagle3_without_a_list_of_layers_uses_an_early_a_middle_and_a_late_one(models: Path) -> None:
    edit_config(models / "target", num_hidden_layers=36)
    edit_config(models / "eagle3", eagle_config=None)
    assert load(models, "e3").layer_ids == (1, 17, 32)


def test_eagle3_default_layers_need_a_deep_enough_target(models: Path) -> None:
    edit_config(models / "eagle3", eagle_config=None)
    assert "(default)` [1, 1, 0] names a layer twice" in refusal(models, "e3")


def test_the_second_spelling_of_eagle3_tensors_is_read_too(models: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors["model." + name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors.pop("model.lm_head.weight")

    edit_tensors(models / "eagle3", rename)
    assert load(models, "e3").kind == "e3"


@pytest.mark.parametrize("kind", ["df", "e3"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 128}, "hidden_size 128, but the target's is 64"),
        ({"vocab_size": 600}, "vocab_size 600, but the target's is 512"),
        ({"hidden_size": None}, "config.json has no `hidden_size`"),
        ({"hidden_size": "64"}, "`hidden_size` is '64', not a whole number"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures is ['Qwen3ForCausalLM'], not a"),
        ({"intermediate_size": 96}, "mlp.gate_proj.weight has shape [128, 64], expected [96, 64]"),
        ({"num_key_value_heads": 1}, "self_attn.k_proj.weight has shape"),
    ],
)
def test_sizes_that_do_not_fit(models: Path, kind: str, changes: dict, said: str) -> None:
    edit_config(models / FOLDERS[kind], **changes)
    assert said in refusal(models, kind)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dflash_config": {"mask_token_id": 7}}, "`dflash_config.target_layer_ids` is None"),
        ({"dflash_config": {"mask_token_id": 7, "target_layer_ids": []}}, "is [], not a list of layer ids"),
        ({"dflash_config": {"mask_token_id": 7, "target_layer_ids": [0, 3]}}, "[0, 3], but the target's 4 layers"),
        ({"dflash_config": {"mask_token_id": 7, "target_layer_ids": [-1, 2]}}, "target_layer_ids[0]` is -1"),
        ({"dflash_config": {"mask_token_id": 7, "target_layer_ids": [0, 1, 2]}}, "fc.weight has shape [64, 128]"),
        ({"dflash_config": {"target_layer_ids": [0, 2]}}, "has no `dflash_config.mask_token_id`"),
        ({"dflash_config": {"mask_token_id": 512, "target_layer_ids": [0, 2]}}, "mask_token_id 512 is outside"),
        ({"dflash_config": [7]}, "`dflash_config` is [7], not an object"),
        ({"block_size": 1}, "`block_size` is 1"),
        ({"block_size": None}, "has no `block_size`"),
        ({"num_hidden_layers": 3}, "the weights lack layers.2.input_layernorm.weight"),
    ],
)
def test_dflash_configs_that_do_not_fit(models: Path, changes: dict, said: str) -> None:
    edit_config(models / "dflash", **changes)
    assert said in refusal(models, "df")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}, "[0, 1, 3], but the target's 4 layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2]}}, "fc.weight has shape [64, 192]"),
        ({"draft_vocab_size": 300}, "lm_head.weight has shape [256, 64], expected [300, 64]"),
        ({"draft_vocab_size": 1024}, "draft_vocab_size 1024 is larger than vocab_size 512"),
        ({"num_hidden_layers": 2}, "has 2 layers"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "norm_before_fc": True}},
            "input_norm.weight",
        ),
        ({"fc_norm": True}, "the weights lack fc_norm.0.weight"),
    ],
)
def test_eagle3_configs_that_do_not_fit(models: Path, changes: dict, said: str) -> None:
    edit_config(models / "eagle3", **changes)
    assert said in refusal(models, "e3")


@pytest.mark.parametrize("kind", ["df", "e3"])
@pytest.mark.parametrize("name", ["fc.weight", "norm.weight"])
def test_a_missing_tensor_is_named(models: Path, kind: str, name: str) -> None:
    """SGLang's loaders leave a parameter that the checkpoint lacks as it was allocated."""
    edit_tensors(models / FOLDERS[kind], lambda tensors: tensors.pop(name))
    assert f"the weights lack {name}" in refusal(models, kind)


def test_a_reduced_draft_vocabulary_needs_its_map(models: Path) -> None:
    edit_tensors(models / "eagle3", lambda tensors: tensors.pop("d2t"))
    assert "the weights lack d2t" in refusal(models, "e3")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("d2t", torch.zeros(200, dtype=torch.int64), "d2t has shape [200], expected [256]"),
        ("d2t", torch.full((256,), 400), "d2t[112] = 400 points outside the vocabulary of 512"),
        ("d2t", torch.zeros(256), "d2t has dtype F32"),
        ("t2d", torch.ones(500, dtype=torch.bool), "t2d has shape [500], expected [512]"),
    ],
)
def test_draft_vocabulary_maps_that_do_not_fit(models: Path, name: str, tensor: torch.Tensor, said: str) -> None:
    edit_tensors(models / "eagle3", lambda tensors: tensors.update({name: tensor}))
    assert said in refusal(models, "e3")


def test_drafters_given_to_each_others_flag(models: Path) -> None:
    target = load_target_spec(str(models / "target"))
    with pytest.raises(CheckpointError, match="were the two drafters swapped"):
        load_drafter_spec(str(models / "eagle3"), "df", target)
    with pytest.raises(CheckpointError, match="were the two drafters swapped"):
        load_drafter_spec(str(models / "dflash"), "e3", target)


def index(folder: Path, **places: str) -> None:
    """An index of the folder's one file, and of what else is named."""
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | places}))


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + b"data"


BROKEN_WEIGHTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "model.safetensors").write_bytes(header("{")), "has a corrupt header"),
    (lambda folder: (folder / "model.safetensors").write_bytes(header("[1]")), "has a corrupt header"),
    (lambda folder: (folder / "model.safetensors").write_bytes(header('{"a": {"dtype": "F32"}}')), "corrupt header"),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        "lacks the weight file model-00002-of-00002.safetensors",
    ),
    (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a'), "is not JSON"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no `weight_map`"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), "no `weight_map`"),
    (lambda folder: index(folder, more="model-2.safetensors"), "lacks the weight file model-2.safetensors"),
    (lambda folder: index(folder, more="model.safetensors"), "lacks more, which the index lists"),
    (lambda folder: (folder / "more.safetensors").symlink_to(folder / "gone"), "cannot be read (No such file"),
    (lambda folder: (folder / "more.safetensors").mkdir(), "cannot be read (Is a directory)"),
]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors file"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled"),
        (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"), "not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is truncated or not a safetensors file"),
        (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "is truncated: 20000 of"),
        *BROKEN_WEIGHTS,
    ],
)
def test_incomplete_folders(models: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(models / "dflash")
    assert said in refusal(models, "df")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(lambda folder: os.truncate(folder / "model.safetensors", 20_000), "is truncated: 20000 of"), *BROKEN_WEIGHTS],
)
def test_a_target_that_is_not_whole(models: Path, spoil: Callable[[Path], object], said: str) -> None:
    """The line that a drafter gets, although SGLang is to load it; its traceback names no file."""
    check_weights("--model-path", str(models / "target"), needed=True)
    spoil(models / "target")
    with pytest.raises(CheckpointError, match=f"^--model-path {re.escape(str(models / 'target'))}.*{re.escape(said)}"):
        check_weights("--model-path", str(models / "target"))


def test_weights_that_sglang_does_not_load_may_be_anything(models: Path) -> None:
    """With an index, it loads the files that the index names; without speculation it loads pickles and dummies too."""
    index(models / "target")
    (models / "target" / "consolidated.safetensors").write_bytes(b"cut")
    check_weights("--model-path", str(models / "target"), needed=True)
    for file in (models / "target").glob("*.safetensors*"):
        file.unlink()
    check_weights("--model-path", str(models / "target"))
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        check_weights("--model-path", str(models / "target"), needed=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_target_of_pickles_is_refused_by_name(models: Path, name: str) -> None:
    """SGLang would load it. With safetensors beside it, it loads those."""
    weights = models / "target" / "model.safetensors"
    shutil.copy(weights, models / "target" / name)
    load_target_spec(str(models / "target"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=rf"--model-path .*its weights are pickled \({re.escape(name)}\)"):
        load_target_spec(str(models / "target"))


def test_weights_in_several_files(models: Path) -> None:
    folder = models / "dflash"
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load(models, "df").kind == "df"
    (folder / "b.safetensors").unlink()
    assert "lacks the weight file b.safetensors" in refusal(models, "df")


# ------------------------------------------------------------------------------------------------------------- hub


def test_a_folder_is_taken_as_it_is(tiny: Path) -> None:
    path = str(tiny / "dflash")
    assert hub.resolve("--x", path, patterns=hub.WHOLE_DRAFTER) == path


@pytest.mark.parametrize("path", ["./models/df", "/nowhere/df", "a/b/c", "~/df", ""])
def test_a_missing_folder_is_no_hub_id(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"--whiflash-eagle-draft.*no such folder.*hub id"):
        hub.resolve("--whiflash-eagle-draft", path, patterns=hub.WHOLE_DRAFTER)


def test_hub_ids_come_from_the_hubs_cache_and_fail_clearly_without_a_network(tiny: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    repo = tmp_path / "hub" / "models--someone--drafter"
    shutil.copytree(tiny / "dflash", repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    program = (
        "from whiflash_sglang.startup import hub\n"
        "from whiflash_sglang.core.errors import CheckpointError\n"
        "print(hub.resolve('--x', 'someone/drafter', patterns=hub.WHOLE_DRAFTER))\n"
        "try: hub.resolve('--x', 'someone/else', patterns=hub.WHOLE_DRAFTER)\n"
        "except CheckpointError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    found, missing = result.stdout.splitlines()
    assert found == str(repo / "snapshots" / ("0" * 40))
    assert missing.startswith("--x someone/else: no such folder, and the hub download failed (LocalEntryNotFoundError")
    assert missing.endswith("or give a local folder")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mlp", "num_ranks", "fits"),
    [(4, 2, 64, 2, True), (4, 2, 64, 4, True), (6, 2, 64, 3, False), (4, 4, 64, 3, False), (4, 2, 63, 2, False)],
)
def test_a_model_is_divided_by_whole_heads_only(models, heads, kv_heads, mlp, num_ranks, fits):
    """SGLang says so by an assertion deep in the ranks. With four of them two have the same KV head."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp}
    edit_config(models / "dflash", **sizes)
    if fits:
        check_ranks(FLAGS["df"], str(models / "dflash"), num_ranks)
        return
    with pytest.raises(CheckpointError, match=f"{FLAGS['df']} .*--tp-size {num_ranks} does not divide; use"):
        check_ranks(FLAGS["df"], str(models / "dflash"), num_ranks)
