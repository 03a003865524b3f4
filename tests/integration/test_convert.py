"""Conversion against the programs on both ends: transformers' models go in and come out, MindSpore's loaders read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.weights import keymap
from llavanext_cli.weights.checkpoint import load_into, open_checkpoint
from tests.loading import convert, load_parameters
from tests.unit.weights.test_weights_keymap import RENAMES, rename

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("mindspore_cpu")  # whoever loads MindSpore first sets it up for all


@pytest.fixture(scope="module")
def tiny_model():
    """A random LLaVA-NeXT-Video of transformers, float32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaNextVideoConfig(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        ),
        LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=256,
        ),
        image_token_index=61,
        video_token_index=60,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return LlavaNextVideoForConditionalGeneration(config)


def bytes_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name → type, shape and bytes of every tensor, read with safetensors' own reader."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                tensor = file.get_tensor(name)
                data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), data)
    return found


@pytest.mark.parametrize(("dtype", "shard"), [("float32", "60KB"), ("float16", "5GB"), ("bfloat16", "60KB")])
def test_there_and_back_through_transformers(dtype: str, shard: str, tiny_model, tmp_path: Path) -> None:
    import copy

    from transformers import LlavaNextVideoForConditionalGeneration

    model = copy.deepcopy(tiny_model).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    convert(tmp_path / "hf", tmp_path / "ours", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", to="hf", verify=True)
    before, after = bytes_of(tmp_path / "hf"), bytes_of(tmp_path / "back")
    assert len(before) == 81 and after == before

    loaded, info = LlavaNextVideoForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    for (name, old), (_, new) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert old.dtype == new.dtype and torch.equal(old, new), name


@pytest.mark.parametrize("scheme", RENAMES)
def test_the_four_naming_schemes_give_one_checkpoint(scheme: str, tiny_model, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "expected")
    tensors = {rename(n, scheme): a for n, a in load_file(tmp_path / "hub" / "model.safetensors").items()}
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_bytes((tmp_path / "hub" / "config.json").read_bytes())
    assert convert(tmp_path / "other", tmp_path / "ours").naming == scheme
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "expected")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "hub")


def test_pickles_give_the_same_checkpoint(tiny_model, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hub")
    tiny_model.save_pretrained(tmp_path / "bin", safe_serialization=False, max_shard_size="60KB")
    assert len(list((tmp_path / "bin").glob("*.bin"))) > 1
    convert(tmp_path / "hub", tmp_path / "a")
    convert(tmp_path / "bin", tmp_path / "b", verify=True)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_convolving_pooler_and_tied_embeddings(tiny_model, tmp_path: Path) -> None:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig.from_dict(
        tiny_model.config.to_dict() | {"spatial_pool_mode": "conv", "tie_word_embeddings": False}
    )
    config.text_config.tie_word_embeddings = True
    model = LlavaNextVideoForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    names = open_checkpoint(tmp_path / "ours").parameters
    assert "pooler.conv.weight" in names and "language_model.lm_head.weight" not in names
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    _, info = LlavaNextVideoForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "hf") and not any(info.values()), info


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_an_image_model_goes_both_ways(text: str, tiny_model, tmp_path: Path) -> None:
    """llava-v1.6-vicuna and llava-v1.6-mistral: model type llava_next, one media token."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    from llavanext_cli.config.model_folder import load_architecture

    fields = tiny_model.config.text_config.to_dict()
    mistral = MistralConfig(
        **{k: v for k, v in fields.items() if k not in ("model_type", "architectures")}, sliding_window=None
    )
    config = LlavaNextConfig(
        tiny_model.config.vision_config,
        mistral if text == "mistral" else tiny_model.config.text_config,
        image_token_index=60,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    architecture = open_checkpoint(tmp_path / "ours").architecture
    assert (architecture.image_token_index, architecture.video_token_index) == (60, 60)
    assert architecture.text == load_architecture(tmp_path / "hf").text
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "hf")
    _, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info


# ------------------------------------------------------------------------------------------------------------ MindSpore


@pytest.fixture
def converted(tiny_model, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", shard_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    return tmp_path / "ours"


@pytest.fixture
def network_of():
    """A network that has the parameters of an architecture and computes nothing."""
    import mindspore as ms
    from mindspore import nn
    from mindspore.common.initializer import initializer

    class Parameters(nn.Cell):
        def __init__(self, shapes: dict, dtype) -> None:
            super().__init__()
            self.all = ms.ParameterTuple(
                [ms.Parameter(initializer("zeros", shape, dtype), name=name) for name, shape in shapes.items()]
            )

    return Parameters


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_a_network_is_filled_and_cast(kind: str, converted: Path, network_of) -> None:
    import mindspore as ms

    checkpoint = open_checkpoint(converted)
    shapes = keymap.expected_parameters(checkpoint.architecture)
    cache = "language_model.model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache"
    network = network_of(shapes | {cache: (3, 2)}, getattr(ms, kind))
    load_into(network, checkpoint)
    reference = load_parameters(checkpoint, kind)
    for parameter in network.get_parameters():
        wanted = np.zeros((3, 2)) if parameter.name == cache else reference[parameter.name]
        np.testing.assert_array_equal(parameter.asnumpy().astype(np.float32), wanted.astype(np.float32))


def test_another_network_is_refused_before_it_is_changed(converted: Path, network_of) -> None:
    import mindspore as ms

    from llavanext_cli.errors import CheckpointError

    checkpoint = open_checkpoint(converted)
    shapes = keymap.expected_parameters(checkpoint.architecture)
    del shapes["image_newline"]
    network = network_of(shapes | {"projector.linear_1.bias": (47,), "lora_A": (2, 2)}, ms.float32)
    with pytest.raises(CheckpointError, match="1 missing, 1 unknown, 1 with an invalid shape or type") as caught:
        load_into(network, checkpoint)
    assert set(caught.value.details) == {
        "missing: lora_A",
        "unknown: image_newline",
        "projector.linear_1.bias: shape [48], needed [47]",
    }
    assert not any(parameter.asnumpy().any() for parameter in network.get_parameters())


@pytest.mark.parametrize("weight_format", ["safetensors", "ckpt"])
def test_mindspores_own_loader_takes_every_weight(
    weight_format: str, converted: Path, tmp_path: Path, network_of
) -> None:
    import mindspore as ms

    checkpoint = open_checkpoint(converted)
    convert(tmp_path / "hf", tmp_path / "out", weight_format=weight_format, dtype="bfloat16", verify=True)
    files = list((tmp_path / "out").glob(f"*.{weight_format}"))
    network = network_of(keymap.expected_parameters(checkpoint.architecture), ms.bfloat16)
    loaded = {}
    for file in files:
        loaded |= ms.load_checkpoint(str(file), format=weight_format)
    left, unused = ms.load_param_into_net(network, loaded, strict_load=True)
    assert len(files) == 1 and left == [] and unused == []
    reference = load_parameters(checkpoint, "bfloat16")
    for parameter in network.get_parameters():
        np.testing.assert_array_equal(
            parameter.asnumpy().astype(np.float32), reference[parameter.name].astype(np.float32)
        )


# ---------------------------------------------------------------------------------------------------------- the command


def command(*arguments: object):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command_converts_both_ways(tiny_model, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hf")
    result = command(tmp_path / "hf", tmp_path / "ours", "--verify", "--shard-size", "100KB")
    assert result.exit_code == 0 and "73 tensors, 386 kB, written and verified" in result.stderr
    assert result.stdout == "" and "Next: llavanext ask" in result.stderr
    result = command(tmp_path / "ours", tmp_path / "back", "--to", "hf", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["tensors"] == 81 and report["files"] == ["model.safetensors"]
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "hf")


def test_a_dry_run_prints_the_plan(tiny_model, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hf")
    result = command(tmp_path / "hf", tmp_path / "ours", "--dry-run")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and len(lines) == 55 and not (tmp_path / "ours").exists()
    assert "image_newline  F32[48]  <- image_newline" in lines and "would be written" in result.stderr


def test_an_error_is_one_line_a_hint_and_a_code(tmp_path: Path) -> None:
    result = command(tmp_path / "none", tmp_path / "ours")
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert f"Error: {tmp_path / 'none'}: no such folder" in result.stderr and "Hint: " in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["a"],
        ["a", "b", "--from-vision", "--from-language"],
        ["a", "--vision", "v"],
        ["a", "b", "--vision", "v", "--language", "l"],
        ["a", "b", "--to", "hf", "--format", "ckpt"],
        ["a", "b", "--to", "hf", "--from-vision"],
        ["a", "b", "--dtype", "int8"],
        ["a", "b", "--seed", "1"],
        ["--vision", "v", "--language", "l"],
        [],
        ["a", "b", "--shard-size", "nan"],
    ],
)
def test_options_that_exclude_each_other_are_a_usage_error(arguments: list[str]) -> None:
    assert command(*arguments).exit_code == 2


def test_the_next_command_can_be_run(tiny_model, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hf")
    tiny_model.model.language_model.save_pretrained(tmp_path / "language")
    tiny_model.model.vision_tower.save_pretrained(tmp_path / "vision")
    result = command(tmp_path / "hf", tmp_path / "a b")
    assert f"--checkpoint '{tmp_path / 'a b'}'\n" in result.stderr
    result = command(tmp_path / "hf", tmp_path / "ckpt", "--format", "ckpt")
    assert result.exit_code == 0 and "Next:" not in result.stderr, "ask and train do not read it"


def test_a_source_named_in_another_encoding(tiny_model, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hf ü")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "llavanext_cli", "convert", tmp_path / "hf ü", tmp_path / "ours"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert json.loads((tmp_path / "ours" / "llavanext_manifest.json").read_text())["source"]["name"] == ["hf ??"]


def test_the_next_run_removes_what_a_killed_one_left(tiny_model, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hf")
    slow = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.loading import convert\n"
        "def wait(done, total):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(60)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=wait)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, tmp_path / "hf", tmp_path / "ours"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".ours.{process.pid}.partial", ".ours.lock", "hf"]
    convert(tmp_path / "hf", tmp_path / "ours", verify=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"] and open_checkpoint(tmp_path / "ours")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_leaves_nothing(number: signal.Signals, code: int, tiny_model, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hf")
    slow = (
        "import sys, time\n"
        "from llavanext_cli import app\n"
        "from llavanext_cli.weights import convert\n"
        "def wait(*_, **__):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(60)\n"
        "convert._write = wait\n"
        "sys.argv = ['llavanext', 'convert', *sys.argv[1:]]\n"
        "app.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, tmp_path / "hf", tmp_path / "ours"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.wait(30) == code and [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_conversion_imports_no_framework(tiny_model, tmp_path: Path) -> None:
    """Neither torch nor MindSpore is needed, so conversion starts at once and runs on a host without a device."""
    tiny_model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.loading import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), verify=True)\n"
        "print(sorted({'torch', 'mindspore', 'mindformers', 'transformers'} & set(sys.modules)))\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "bin", tmp_path / "ours"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.stdout == "[]\n" and time.monotonic() - started < 60
