"""What clip_min.py promises about weights: every form of file gives the same CLIP, nothing in a file is run, no broken
file gets through, and a download is verified and put in place only when whole. The files are made here, the hosts are a
server on this machine.

What transformers and open_clip answer was recorded once by `python tests/test_weights.py --record`; where these
packages are installed, the same comparisons run live as well.
"""

import argparse
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import B16, TINY, at_most, call, openai_clip, random_numbers, random_state_dict
from torch import nn

import clip_min
from clip_min import CLIP, UserError, load_clip, tokenize
from support import downloads, weights
from support.downloads import download

SMALL = TINY | dict(vision_layers=1, text_layers=1)
FIXTURES = Path(__file__).parent / "fixtures"


# ---- Files ----


class Tree(nn.Module):
    """Parameters under any dotted names: what torch.jit.save makes of it looks like OpenAI's archives."""

    def __init__(self, state):
        super().__init__()
        for key, value in state.items():
            *path, name = key.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, Tree({}))
                module = module._modules[part]
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x):
        return x + 1


def save_torchscript(state, path):
    save_traced(Tree(state), torch.zeros(1), path)


def save_traced(model, example, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated: OpenAI's files remain
        torch.jit.save(torch.jit.trace(model, example, check_trace=False), str(path))


def save_safetensors(state, path):
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, value in state.items():
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[key], data = dict(dtype=names[value.dtype], shape=list(value.shape), data_offsets=offsets), data + raw
    text = json.dumps(dict(sorted(header.items(), reverse=True))).encode()  # the header's order is not the data's
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def save_gzipped(state, path):
    save_safetensors(state, path)
    path.write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


FORMS = dict(torchscript=save_torchscript, safetensors=save_safetensors, gzipped_safetensors=save_gzipped,
             state_dict=torch.save, state_dict_of_old_torch=save_legacy)  # fmt: skip


def to_transformers(state):
    """OpenAI's state dict as transformers' CLIPModel writes it."""
    renamed = {
        "logit_scale": state["logit_scale"], "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.position_ids": torch.arange(len(state["positional_embedding"])).unsqueeze(0),
    }  # fmt: skip
    modules = {"vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post",
               "text_model.final_layer_norm": "ln_final"}  # fmt: skip
    for theirs, ours in ("vision_model", "visual.transformer"), ("text_model", "transformer"):
        for i in range(len({key.split(".resblocks.")[1].split(".")[0] for key in state if key.startswith(ours)})):
            layer, block = f"{theirs}.encoder.layers.{i}", f"{ours}.resblocks.{i}"
            for kind in "weight", "bias":
                for name, part in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{name}_proj.{kind}"] = part.contiguous()
            modules |= {
                f"{layer}.self_attn.out_proj": f"{block}.attn.out_proj", f"{layer}.layer_norm1": f"{block}.ln_1",
                f"{layer}.layer_norm2": f"{block}.ln_2", f"{layer}.mlp.fc1": f"{block}.mlp.c_fc",
                f"{layer}.mlp.fc2": f"{block}.mlp.c_proj",
            }  # fmt: skip
    for theirs, ours in modules.items():
        renamed |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    return renamed


def transformers_config(text_heads, vision_heads, hidden_act):
    config = {"model_type": "clip", "text_config": dict(num_attention_heads=text_heads, hidden_act=hidden_act),
              "vision_config": dict(num_attention_heads=vision_heads, hidden_act=hidden_act)}  # fmt: skip
    return json.dumps(config).encode()


class Hostile:
    """A pickle that, when run, makes a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def replace_in_zip(path, ending, change):
    """Write the archive again with change(content) for the record whose name has this ending."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith(ending) else content)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture(scope="module")
def state():
    return random_state_dict(**SMALL)


@pytest.fixture(scope="module")
def file_of(state, tmp_path_factory):
    """A small CLIP in each form, made once: file_of["torchscript"] -> bytes."""
    folder, files = tmp_path_factory.mktemp("forms"), {}
    for form, save in FORMS.items():
        save(random_state_dict(**SMALL, vocab=20), folder / form)
        files[form] = (folder / form).read_bytes()
    return files


# ---- Three forms, one result ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_clip_to_the_bit(form, dtype, state, tmp_path):
    state = {key: value.to(dtype) for key, value in state.items()}
    FORMS[form](state, tmp_path / "weights")
    clip = load_clip(tmp_path / "weights")
    assert same(clip, CLIP.from_state_dict(state))
    assert {(p.dtype, p.requires_grad) for p in clip.parameters()} == {(torch.float32, False)} and not clip.training


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_recognised_by_its_content_not_by_its_name(form, suffix, file_of, tmp_path):
    path = write(tmp_path / f"model{suffix}", file_of[form])
    assert same(load_clip(path), CLIP.from_state_dict(random_state_dict(**SMALL, vocab=20)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_bfloat16(form, state, tmp_path):
    state = {key: value.bfloat16() for key, value in state.items()}
    FORMS[form](state, tmp_path / "weights")
    assert same(load_clip(str(tmp_path / "weights")), CLIP.from_state_dict(state))


def test_an_archive_traced_from_openais_own_model_gives_its_outputs(state, tmp_path):
    model = openai_clip(state)
    for name, value in dict(input_resolution=32, context_length=77, vocab_size=49408).items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    images, tokens = torch.randn(2, 3, 32, 32), tokenize(["a cat", "a dog"])
    save_traced(model, (images, tokens), tmp_path / "ViT-tiny.pt")
    clip = load_clip(tmp_path / "ViT-tiny.pt")
    assert same(clip, CLIP.from_state_dict(state))
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-5)


def test_an_archive_saved_on_a_gpu_opens_without_one(state, tmp_path):
    path = tmp_path / "gpu.pt"
    save_torchscript(state, path)
    cpu, cuda = (b"X" + len(name).to_bytes(4, "little") + name for name in (b"cpu", b"cuda:0"))
    found = []
    replace_in_zip(path, "/data.pkl", lambda content: found.append(cpu in content) or content.replace(cpu, cuda))
    assert found == [True]
    assert same(load_clip(path), CLIP.from_state_dict(state))


def test_tensors_that_are_views_of_others_are_read_as_they_are(tmp_path):
    state = random_state_dict(**SMALL)
    state["visual.proj"] = state["visual.proj"].T.contiguous().T  # not contiguous
    base = torch.randn(200)
    state["ln_final.weight"], state["ln_final.bias"] = base[10:74], base[100:164]  # one storage, offsets
    for form in ("torchscript", "state_dict"):
        FORMS[form](state, tmp_path / form)
        assert same(load_clip(tmp_path / form), CLIP.from_state_dict(state))


def test_the_clip_of_a_file_can_be_trained_and_written_again(file_of, tmp_path):
    clip = load_clip(write(tmp_path / "a.safetensors", file_of["safetensors"]))
    clip.requires_grad_(True)
    with torch.no_grad():
        clip.visual.proj.mul_(2)  # its memory is its own and writable
    torch.save(clip.state_dict(), tmp_path / "again.pt")


def test_the_parameters_of_another_model_are_left_as_they_were(state):
    theirs = {key: nn.Parameter(value.half()) for key, value in state.items()}
    assert same(CLIP.from_state_dict(theirs), CLIP.from_state_dict({key: p.data for key, p in theirs.items()}))
    assert {(p.dtype, p.requires_grad) for p in theirs.values()} == {(torch.float16, True)}


# ---- clip_min.py alone ----

ALONE = """
import json, sys, torch
import clip_min, coop

answers = {}
for path in sys.argv[1:]:
    try:
        method = coop.CoOp(clip_min.load_clip(path), ["cat", "dog"], n_ctx=2)
        images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
        optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.01)
        before = method.loss(images, labels)
        before.backward()
        optimizer.step()
        answers[path] = [before.item(), method.loss(images, labels).item()]
    except clip_min.UserError as error:
        answers[path] = str(error)
assert not any(name.split(".")[0] in ("support", "data", "train") for name in sys.modules)
print(json.dumps(answers))
"""
FORMS_OF_OPENAI = "torchscript", "safetensors", "state_dict", "state_dict_of_old_torch"
BEYOND = ["ViT-B/16", "ViT-B-16", "tiny", "laion/CLIP-B", "nowhere.pt", ".", "transformers.pt", "gzipped_safetensors",
          "cut.pt", "hostile.pt", "page.html", "configured/weights"]  # fmt: skip


@pytest.fixture(scope="module")
def answers_alone(state, tmp_path_factory):
    """What clip_min.py and coop.py, copied into an empty folder with the vocabulary, make of each file and name."""
    folder, root = tmp_path_factory.mktemp("alone"), Path(clip_min.__file__).parent
    (folder / "assets").mkdir()
    for name in "clip_min.py", "coop.py", "assets/bpe_merges.txt.gz":
        shutil.copy(root / name, folder / name)
    for form in (*FORMS_OF_OPENAI, "gzipped_safetensors"):
        FORMS[form](state, folder / form)
    torch.save(to_transformers(state), folder / "transformers.pt")
    torch.save(state | {"visual.proj": Hostile(folder / "ran")}, folder / "hostile.pt")
    write(folder / "cut.pt", (folder / "torchscript").read_bytes()[:-1])
    write(folder / "page.html", b"<html>sign in</html>")
    write(folder / "configured" / "weights", (folder / "safetensors").read_bytes())
    write(folder / "configured" / "open_clip_config.json", OPEN_CLIP_CONFIG)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ALONE, *FORMS_OF_OPENAI, *BEYOND], cwd=folder, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # no warning of PyTorch's
    return json.loads(done.stdout) | {"ran": (folder / "ran").exists()}


@pytest.mark.parametrize("form", FORMS_OF_OPENAI)
def test_clip_min_alone_loads_what_is_in_openais_keys_and_trains(form, answers_alone):
    before, after = answers_alone[form]
    assert math.isfinite(after) and after != before


@pytest.mark.parametrize("name", BEYOND)
def test_clip_min_alone_says_in_one_sentence_what_to_copy(name, answers_alone):
    assert re.fullmatch(rf"[^\n]* not {re.escape(name)} \([^\n]*\): copy the project's folder support[^\n]*",
                        answers_alone[name])  # fmt: skip


def test_clip_min_alone_runs_nothing_of_a_file(answers_alone):
    assert "hostile.pt" in answers_alone and not answers_alone["ran"]


@pytest.mark.parametrize("form", FORMS_OF_OPENAI)
def test_what_is_in_openais_keys_is_read_without_support(form, file_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "support.weights", None)
    clip = load_clip(write(tmp_path / "weights", file_of[form]), activation="gelu")
    assert same(clip, CLIP.from_state_dict(random_state_dict(**SMALL, vocab=20))) and clip.activation == "gelu"


@pytest.mark.parametrize("alone", [False, True])
def test_an_archive_that_was_written_on_a_gpu_is_read_on_a_cpu(alone, file_of, tmp_path, monkeypatch):
    """As OpenAI's were."""
    if alone:
        monkeypatch.setitem(sys.modules, "support.weights", None)
    path, device = tmp_path / "weights.pt", (b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    with zipfile.ZipFile(io.BytesIO(file_of["torchscript"])) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(*device))
    assert same(load_clip(path), CLIP.from_state_dict(random_state_dict(**SMALL, vocab=20)))


def test_weights_of_open_clip_are_not_read_without_support(file_of, tmp_path, monkeypatch):
    """Their activation and heads may differ from OpenAI's, and no key tells."""
    monkeypatch.setitem(sys.modules, "support.weights", None)
    write(tmp_path / "open_clip_config.json", b"{}")
    with pytest.raises(UserError, match="weights .*the configuration beside it is open_clip's.*copy"):
        load_clip(write(tmp_path / "weights", file_of["safetensors"]))


def test_another_package_called_support_is_no_hindrance(file_of, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "support.weights")
    monkeypatch.setitem(sys.modules, "support", types.ModuleType("support"))
    assert load_clip(write(tmp_path / "weights", file_of["safetensors"])).activation == "quickgelu"
    with pytest.raises(UserError, match="not ViT-B/16 .*copy the project's folder support"):
        load_clip("ViT-B/16")


# ---- Nothing from a file is run ----


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_is_not_run(protocol, tmp_path):
    path = write(tmp_path / "bad.pt", pickle.dumps({"visual.proj": Hostile(tmp_path / "ran")}, protocol=protocol))
    with pytest.raises(UserError, match="bad.pt"):
        load_clip(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_hostile_state_dict_is_not_run(new, state, tmp_path):
    bad = state | {"visual.proj": Hostile(tmp_path / "ran")}
    torch.save(bad, tmp_path / "bad.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match="bad.pt"):
        load_clip(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_hostile_object_beside_the_weights_is_not_run_and_the_weights_are_read(new, small, tmp_path):
    content = {"optimizer": Hostile(tmp_path / "ran"), "state_dict": small, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "odd.pt", _use_new_zipfile_serialization=new)
    assert same(load_clip(tmp_path / "odd.pt"), CLIP.from_state_dict(small))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_torchscript_archive_is_not_run(protocol, file_of, tmp_path):
    path = write(tmp_path / "bad.pt", file_of["torchscript"])
    replace_in_zip(path, "/data.pkl", lambda _: pickle.dumps([Hostile(tmp_path / "ran")], protocol=protocol))
    with pytest.raises(UserError, match="bad.pt"):
        load_clip(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("call", [
    b"cbuiltins\neval\n(V__import__('os').mkdir({ran!r})\ntR.", b"cposix\nmkdir\n(V{ran}\ntR.",
    b"ctorch.serialization\nload\n(V{ran}\ntR.", b"c__torch__.builtins\neval\n(V__import__('os').mkdir({ran!r})\ntR.",
    b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", b"ccollections\nOrderedDict.__init__.__globals__\n.",
])  # fmt: skip
def test_no_global_in_an_archive_reaches_a_function(call, file_of, tmp_path):
    path, ran = write(tmp_path / "bad.pt", file_of["torchscript"]), str(tmp_path / "ran")
    call = call.replace(b"{ran!r}", repr(ran).encode()).replace(b"{ran}", ran.encode())
    replace_in_zip(path, "/data.pkl", lambda _: call)
    with pytest.raises(UserError, match="bad.pt|not the weights"):
        load_clip(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", ["/constants.pkl", ".py", "/version"])
def test_the_rest_of_an_archive_is_not_even_read(ending, file_of, tmp_path):
    path = write(tmp_path / "odd.pt", file_of["torchscript"])
    hostile = pickle.dumps(Hostile(tmp_path / "ran"))
    replace_in_zip(path, ending, lambda _: hostile + f"\nimport os; os.mkdir({str(tmp_path / 'ran')!r})".encode())
    load_clip(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["safetensors", "gzipped_safetensors"])
def test_a_pickle_in_place_of_a_safetensors_header_is_not_run(form, tmp_path):
    hostile = pickle.dumps(Hostile(tmp_path / "ran"), protocol=0)
    content = len(hostile).to_bytes(8, "little") + hostile
    path = write(tmp_path / "bad.safetensors", gzip.compress(content) if form.startswith("gzip") else content)
    with pytest.raises(UserError, match="bad.safetensors"):
        load_clip(path)
    assert not (tmp_path / "ran").exists()


# ---- Broken files ----


@pytest.mark.parametrize("part", [0, 1, 7, 9, 100, 0.1, 0.5, 0.9, 0.99], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_anywhere_is_refused_by_name(form, part, file_of, tmp_path):
    whole = file_of[form]
    cut = int(part * len(whole)) if isinstance(part, float) else part
    path = write(tmp_path / "cut.pt", whole[:cut])
    with pytest.raises(UserError, match="cut.pt is not a whole weights file"):
        load_clip(path)


@pytest.mark.parametrize("form", ["torchscript", "safetensors", "gzipped_safetensors", "state_dict"])
def test_a_file_that_lacks_its_last_byte_is_refused(form, file_of, tmp_path):
    with pytest.raises(UserError, match="cut.pt is not a whole weights file"):
        load_clip(write(tmp_path / "cut.pt", file_of[form][:-1]))


@pytest.mark.parametrize("form", ["torchscript", "gzipped_safetensors"])
def test_a_changed_byte_is_found_where_the_form_has_checksums(form, file_of, tmp_path):
    whole = bytearray(file_of[form])
    whole[len(whole) // 2] ^= 1
    with pytest.raises(UserError, match="changed.pt"):
        load_clip(write(tmp_path / "changed.pt", whole))


@pytest.mark.parametrize("change", [lambda raw: raw + b"\0", lambda raw: raw[:-1]])
def test_safetensors_are_as_long_as_their_header_says(change, file_of, tmp_path):
    with pytest.raises(UserError, match="it is longer or shorter than its header says"):
        load_clip(write(tmp_path / "weights", change(file_of["safetensors"])))


@pytest.mark.parametrize("form", ["torchscript", "gzipped_safetensors", "state_dict"])
def test_a_byte_changed_anywhere_is_refused_or_changes_nothing(form, file_of, tmp_path):
    whole, expected = file_of[form], CLIP.from_state_dict(random_state_dict(**SMALL, vocab=20))
    refused, path, choose = 0, tmp_path / "changed.pt", random.Random(0)
    for _ in range(24):
        changed = bytearray(whole)
        changed[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        try:
            assert same(load_clip(write(path, changed)), expected)
        except UserError as error:
            assert "changed.pt" in str(error)
            refused += 1
    assert refused > 18  # the rest is padding


def test_an_archive_that_was_written_without_checksums_is_read(small, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(small, tmp_path / "plain.pt")
        torch.save({"model": small, "args": argparse.Namespace(lr=0.1)}, tmp_path / "objects.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    for file in "plain.pt", "objects.pt":
        assert same(load_clip(tmp_path / file), CLIP.from_state_dict(small))


@pytest.mark.parametrize("content", [
    b"", b"\0", b"\0" * 1000, b"not weights", b"<!DOCTYPE html><html><body>404: not found</body></html>",
    b'{"error": "Access to model is restricted"}', b'{"data":{"dtype": 1}}', b"\x1f\x8b", gzip.compress(b""),
    gzip.compress(b"hello"), b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"version https://git-lfs.github.com/spec/v1\n",
    (3).to_bytes(8, "little") + b"{}}", (2).to_bytes(8, "little") + b"{}", pickle.dumps(3), bytes(range(256)) * 9,
    (2**62).to_bytes(8, "little") + b"{}", b"\x89PNG\r\n\x1a\n{",
], ids=lambda content: ascii(content[:12]))  # fmt: skip
def test_what_is_not_weights_is_refused(content, tmp_path):
    with pytest.raises(UserError, match="page is not a whole weights file|not the weights of a CLIP ViT|page: This is"):
        load_clip(write(tmp_path / "page", content))


@pytest.mark.parametrize("start, form", [(b"GGUF\3\0\0\0", "llama.cpp"), (b"\x89HDF\r\n\x1a\n", "TensorFlow"),
                                         (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs pull")])
def test_files_of_other_programs_are_called_so(start, form, tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path / 'model'}: This is [^\n]*{form}[^\n]*\.$"):
        load_clip(write(tmp_path / "model", start + bytes(200)))


@pytest.mark.parametrize("content", [
    3, [torch.zeros(3)], torch.zeros(3), {"epoch": 3, "state_dict": {}}, {1: torch.zeros(3)},
], ids=["a number", "a list", "a tensor", "a training checkpoint", "keys that are numbers"])  # fmt: skip
def test_a_pickle_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not the weights of a CLIP ViT|other.pt"):
        load_clip(tmp_path / "other.pt")


@pytest.mark.parametrize("entry", [
    dict(dtype="F32", shape=[2], data_offsets=[0, 4]), dict(dtype="F33", shape=[1], data_offsets=[0, 4]),
    dict(dtype="F32", shape=[1], data_offsets=[4, 8]), dict(dtype="F32", shape=[1], data_offsets=[4, 0]),
    dict(dtype="F32", shape=[1]), dict(dtype="F32", shape=[2], data_offsets=[0, 8]), 7,
], ids=str)  # fmt: skip
def test_a_safetensors_header_that_does_not_fit_its_data_is_refused(entry, tmp_path):
    header = json.dumps({"visual.proj": entry}).encode()
    path = write(tmp_path / "odd.safetensors", len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(UserError, match="odd.safetensors"):
        load_clip(path)


def test_a_path_that_is_not_there_lists_the_names(tmp_path):
    with pytest.raises(UserError, match="nowhere.pt.*tiny.*ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px"):
        load_clip(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="ViT-B/61.*tiny.*ViT-B/16"):
        load_clip("ViT-B/61")


def test_a_path_may_begin_with_a_tilde(file_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "my.pt", file_of["state_dict"])
    assert load_clip("~/my.pt").encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 64)
    with pytest.raises(UserError, match="There is no weights file ~nobody-has-this-name/my.pt"):
        load_clip("~nobody-has-this-name/my.pt")


# ---- Other people's forms: the same CLIP from each ----


def lightning(state):
    return {"pytorch-lightning_version": "2.0", "state_dict": {f"model.{key}": value for key, value in state.items()}}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def training_checkpoint(state):
    weights = {f"module.{key}": value for key, value in state.items()}
    return {"epoch": 32, "name": "a run", "state_dict": weights, "optimizer": {"state": {0: {"step": 3}}}}


def custom_text_clip(state):
    visual = "visual.", "logit_scale"
    return {key if key.startswith(visual) else f"text.{key}": value for key, value in state.items()}


WRAPPED = {
    "transformers": to_transformers, "a training checkpoint": training_checkpoint, "Lightning": lightning,
    "model": lambda state: {"model": state, "args": {"lr": 0.1}}, "CustomTextCLIP": custom_text_clip,
    "DistributedDataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "a bias of 0": lambda state: state | {"logit_bias": torch.zeros(())},
    "a scale in a list": lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)},
    "a CustomTextCLIP in training": lambda state: training_checkpoint(custom_text_clip(state)),
    "transformers in Lightning": lambda state: lightning(to_transformers(state)),
    "compiled, in a dictionary": lambda state: {"model_state_dict": under("module._orig_mod.", state)},
    "one tower compiled": lambda state: {key.replace("visual.", "visual._orig_mod."): v for key, v in state.items()},
    "beside a loss": lambda state: {"state_dict": {"loss.weight": torch.ones(3)} | under("net.clip.", state)},
    "beside a classifier": lambda state: state | {"classifier.weight": torch.ones(3, 64), "_extra": torch.ones(1)},
    "transformers beside a loss": lambda state: {"loss.scale": torch.ones(1)} | under("clip.", to_transformers(state)),
    "beside another model": lambda state: state | {"teacher.visual.trunk.norm.weight": torch.ones(3)},
    "deep": lambda state: {"a": {"b": {3: {"c": state}}}, "d": [state]},
    "with a running mean": lambda state: {"model": state, "model_ema": {key: v + 1 for key, v in state.items()}},
    "with objects": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "best": {"top1": Path("x")},
                                   "optimizer": torch.optim.SGD([torch.ones(1)], lr=1), "none": torch.zeros(0)},
    "parameters": lambda state: {key: nn.Parameter(value) for key, value in state.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """A state dict with few words, for what does not read texts."""
    return random_state_dict(**SMALL, vocab=20)


@pytest.fixture(scope="module")
def tiny():
    """The tiny CLIP's state dict, two pictures and its features of them and of two classes."""
    state, clip = weights.read_state(clip_min.ASSETS / "tiny_clip.safetensors.gz"), load_clip("tiny")
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    return state, images, clip.encode_image(images), clip.classifier(["cat", "dog"])


@pytest.mark.parametrize("form", WRAPPED)
def test_other_forms_give_the_same_clip(form, small, tmp_path):
    torch.save(WRAPPED[form](small), tmp_path / "weights.pt")
    assert same(load_clip(tmp_path / "weights.pt"), CLIP.from_state_dict(small))


@pytest.mark.parametrize("form", WRAPPED)
def test_the_tiny_clip_in_other_forms_gives_the_same_features(form, tiny, tmp_path):
    state, images, image_features, classifier = tiny
    torch.save(WRAPPED[form](state), tmp_path / "weights.pt")
    clip = load_clip(tmp_path / "weights.pt")
    torch.testing.assert_close(clip.encode_image(images), image_features, rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.classifier(["cat", "dog"]), classifier, rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "model.safetensors", "pytorch_model.bin"])
def test_a_folder_may_be_given(file, small, tmp_path):
    save = save_safetensors if file.endswith("safetensors") else torch.save
    save(small if file.startswith("open_clip") else to_transformers(small), tmp_path / file)
    assert same(load_clip(tmp_path), CLIP.from_state_dict(small))


@pytest.mark.parametrize("names", [("student.", "teacher."), ("model.student.", "model.teacher."), ("a.", "b.", "c.")])
def test_several_clips_are_refused(names, small, tmp_path):
    torch.save({name + key: value for name in names for key, value in small.items()}, tmp_path / "both.pt")
    with pytest.raises(UserError, match=f"both.pt: These are not .* of several, under {', '.join(names)}: save one"):
        load_clip(tmp_path / "both.pt")


def test_dictionaries_that_contain_each_other_are_read_once(small, tmp_path):
    content = {"state_dict": small}
    content["itself"] = last = content
    for _ in range(30):  # 2^30 ways to the last
        last["a"] = last["b"] = last = {}
    torch.save(content, tmp_path / "loop.pt")
    assert same(load_clip(tmp_path / "loop.pt"), CLIP.from_state_dict(small))


@pytest.mark.parametrize("form, left_out", [
    ("beside a loss", "state_dict.loss"), ("beside a classifier", "classifier, _extra"), ("model", "args"),
    ("with a running mean", "model_ema"), ("with objects", "args, optimizer, none, best"),
    ("a training checkpoint", "epoch, name, optimizer"), ("compiled, in a dictionary", None), ("transformers", None),
])  # fmt: skip
def test_one_line_says_what_was_left_out(form, left_out, small, tmp_path, capsys):
    torch.save(WRAPPED[form](small), tmp_path / "weights.pt")
    load_clip(tmp_path / "weights.pt")
    expected = f"warning: {tmp_path / 'weights.pt'} holds more than a CLIP, left out: {left_out}\n" if left_out else ""
    assert capsys.readouterr().err == expected


# ---- Activation and heads ----


def test_without_a_configuration_the_activation_is_quickgelu_and_may_be_chosen(file_of, tmp_path):
    path = write(tmp_path / "weights", file_of["safetensors"])
    assert (load_clip(path).activation, load_clip(path, activation="gelu").activation) == ("quickgelu", "gelu")
    with pytest.raises(UserError, match="activation is relu: choose quickgelu or gelu"):
        load_clip(path, activation="relu")


def test_the_activation_is_in_every_block_of_both_towers(small):
    quick, exact = CLIP.from_state_dict(small), CLIP.from_state_dict(small, activation="gelu")
    x = torch.linspace(-3, 3, 13)
    for clip, expected in (quick, x / (1 + (-1.702 * x).exp())), (exact, x * (1 + (x / 2**0.5).erf()) / 2):
        for block in [*clip.visual.blocks, *clip.text.blocks]:
            torch.testing.assert_close(block.activation(x), expected)


@pytest.mark.parametrize("folder, config, expected", [
    ("a", {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}, ("gelu", 12, 8)),
    ("a-quickgelu", {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}, ("quickgelu", 12, 8)),
    ("a", {"model_cfg": dict(quick_gelu=True, vision_cfg=dict(width=1280, head_width=80), text_cfg=dict(heads=16))},
     ("quickgelu", 16, 16)),
    ("a-quickgelu", {"model_cfg": {"quick_gelu": False, "vision_cfg": {}, "text_cfg": {}}}, ("gelu", 12, 8)),
])  # fmt: skip
def test_the_configuration_of_open_clip_is_read(folder, config, expected, tmp_path):
    write(tmp_path / folder / "open_clip_config.json", json.dumps(config).encode())
    found = weights.read_configuration(tmp_path / folder)
    assert (found["activation"], found["vision_heads"], found["text_heads"]) == expected


@pytest.mark.parametrize("config, expected", [
    ({"text_config": {}, "vision_config": {}}, ("quickgelu", 12, 8)),
    ({"text_config": dict(num_attention_heads=16), "vision_config": dict(hidden_act="gelu", num_attention_heads=14)},
     ("gelu", 14, 16)),
])  # fmt: skip
def test_the_configuration_of_transformers_is_read(config, expected, tmp_path):
    write(tmp_path / "config.json", json.dumps(config | {"model_type": "clip"}).encode())
    found = weights.read_configuration(tmp_path)
    assert (found["activation"], found["vision_heads"], found["text_heads"]) == expected


def test_the_configuration_of_something_else_is_left_alone(tmp_path):
    write(tmp_path / "config.json", b'{"model_type": "siglip", "vision_config": {}}')
    assert weights.read_configuration(tmp_path) == {}


@pytest.mark.parametrize("config", [b"{", b"[]", b'{"model_cfg": 3}', b'{"model_cfg": {}}', b'{"model_type": "clip"}'])
def test_a_configuration_that_cannot_be_read_is_named(config, file_of, tmp_path):
    write(tmp_path / "open_clip_config.json", config)
    with pytest.raises(UserError, match="open_clip_config.json"):
        load_clip(write(tmp_path / "weights", file_of["safetensors"]))


@pytest.mark.parametrize("heads", [0, -2, 2.0, True, "2", None], ids=repr)
def test_heads_in_a_configuration_that_are_no_number_are_named(heads, file_of, tmp_path):
    config = {"model_type": "clip", "text_config": {}, "vision_config": {"num_attention_heads": heads}}
    write(tmp_path / "config.json", json.dumps(config).encode())
    with pytest.raises(UserError, match=rf"config.json is not the configuration of a CLIP \({heads} attention heads\)"):
        load_clip(write(tmp_path / "weights", file_of["safetensors"]))


def test_heads_of_no_width_in_a_configuration_are_named(file_of, tmp_path):
    config = {"model_cfg": {"vision_cfg": {"head_width": 0}, "text_cfg": {}}}
    write(tmp_path / "open_clip_config.json", json.dumps(config).encode())
    with pytest.raises(UserError, match="open_clip_config.json is not the configuration of a CLIP"):
        load_clip(write(tmp_path / "weights", file_of["safetensors"]))


def test_an_activation_that_is_not_known_is_named(file_of, tmp_path):
    write(tmp_path / "config.json", transformers_config(1, 2, "gelu_new"))
    with pytest.raises(UserError, match="activation is gelunew"):
        load_clip(write(tmp_path / "weights", file_of["safetensors"]))


@pytest.mark.parametrize("width", [1088])
def test_a_width_whose_heads_are_not_64_wide_needs_a_configuration(width, tmp_path):
    weights = random_state_dict(**SMALL | dict(vision_width=width), vocab=20)
    with pytest.raises(UserError, match=f"heads .*width {width} .*open_clip_config.json or config.json"):
        CLIP.from_state_dict(weights)
    clip = CLIP.from_state_dict(weights, vision_heads=16)
    assert clip.visual.blocks[0].attn.heads == 16 and clip.text.blocks[0].attn.heads == 1
    save_safetensors(weights, tmp_path / "weights")
    with pytest.raises(UserError, match=f"heads .*width {width} .*open_clip_config.json or config.json"):
        load_clip(tmp_path / "weights")


def test_heads_that_do_not_divide_the_width_are_refused(small):
    with pytest.raises(UserError, match="heads for its width 128 is not 12"):
        CLIP.from_state_dict(small, vision_heads=12)


# ---- What cannot be read says what it is ----


def with_zero(key, dimension):
    def change(state):
        return state | {key: state[key].narrow(dimension, 0, 0)}

    return change


DEGENERATE = {
    "no vocabulary": with_zero("token_embedding.weight", 0), "no joint width": with_zero("text_projection", 1),
    "no patch": lambda state: state | {"visual.conv1.weight": torch.zeros(128, 3, 0, 0)},
    "no image blocks": lambda state: {key: value for key, value in state.items() if "visual.transformer" not in key},
    "no text blocks": lambda state: {key: value for key, value in state.items() if not key.startswith("transformer")},
    "no patches": lambda state: state | {"visual.positional_embedding": torch.zeros(1, 128)},
    "no positions": with_zero("positional_embedding", 0), "two scales": lambda s: s | {"logit_scale": torch.ones(2)},
}  # fmt: skip


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_shapes_are_refused(case, small):
    with pytest.raises(UserError, match="^These are not the weights of a CLIP ViT: [^\n]*$"):
        weights.build_clip(DEGENERATE[case](small))


@pytest.mark.parametrize(
    "sizes", [dict(text_width=96), dict(text_width=32), dict(vision_width=32), dict(vision_width=100)])
def test_widths_without_whole_heads_are_refused(sizes):
    with pytest.raises(UserError, match="^These are not the weights of a CLIP ViT: the number of attention heads"):
        CLIP.from_state_dict(random_state_dict(**SMALL | sizes, vocab=20))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_numbers_without_fractions_or_with_an_imaginary_part_are_refused(dtype, small):
    with pytest.raises(UserError, match="not the weights of a CLIP ViT: it has other numbers than floats"):
        CLIP.from_state_dict(small | {"visual.proj": small["visual.proj"].to(dtype)})


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["visual.proj", "logit_scale", "transformer.resblocks.0.ln_2.bias"])
def test_numbers_that_are_not_finite_are_an_error(key, number, small):
    damaged = small[key].clone()
    damaged.view(-1)[-1] = number
    with pytest.raises(UserError, match="not finite.*download"):
        weights.build_clip(small | {key: damaged})


def siglip(state):
    probe = torch.zeros(1, 1, 128)
    return to_transformers(state) | {"vision_model.head.probe": probe, "logit_bias": torch.tensor(-16.0)}


def bert(prefix, state):
    """The image tower of a CLIP, and a BERT under a prefix."""
    texts = {f"{prefix}embeddings.word_embeddings.weight": torch.zeros(30522, 8),
             f"{prefix}encoder.layer.0.attention.self.query.weight": torch.zeros(8, 8)}  # fmt: skip
    towers = "visual", "vision_model", "logit_scale", "text_projection"
    return texts | {key: value for key, value in state.items() if key.startswith(towers)}


def eva(state):
    without = {key: value for key, value in state.items() if not key.startswith("visual")}
    return without | {"visual.blocks.0.attn.q_proj.weight": torch.zeros(8, 8), "visual.proj": torch.zeros(8, 8)}


def words(number):
    return lambda state: state | {"token_embedding.weight": torch.zeros(number, 64)}


def long_clip(state):
    return state | {"positional_embedding_res": state["positional_embedding"]}


OTHERS = {  # what it is, then a word that tells apart two cases of it
    "a ResNet CLIP": lambda state: state | {"visual.layer1.0.conv1.weight": torch.zeros(8, 8, 1, 1)},
    "a SigLIP": siglip, "a diffusion model": lambda _: {"model.diffusion_model.out.0.weight": torch.zeros(3)},
    "a diffusion model|with a text tower": lambda state: {"model.diffusion_model.out.0.bias": torch.zeros(3)} | {
        f"cond_stage_model.{key}": value for key, value in state.items() if not key.startswith("visual")},
    "a SigLIP or another CLIP": lambda state: {"visual.trunk.blocks.0.norm1.weight": torch.zeros(3)},
    "a Long-CLIP, which has a second table of positions": long_clip,
    "a Long-CLIP|in Lightning": lambda state: lightning(long_clip(state)),
    "a Chinese-CLIP": lambda state: training_checkpoint(bert("bert.", state)),
    "a CLIP with another text tower|transformers": lambda state: bert("text_model.", to_transformers(state)),
    "a CLIP with another text tower|open_clip": lambda state: bert("text.transformer.", state),
    "a CLIP with another text tower|T5": lambda state: {
        "text.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(8, 8), **bert("text.", state)},
    "an EVA-CLIP": lambda state: {"model": eva(state)},
    "a CLIP with another tokenizer, of 901629 words": lambda state: to_transformers(words(901629)(state)),
    "a CLIP with another tokenizer, of 32000 words": words(32000),
    "a CoCa": lambda state: state | {"text_decoder.ln_final.weight": torch.zeros(3)},
    "an Alpha-CLIP": lambda state: state | {"visual.conv1_alpha.weight": torch.zeros(3)},
    "a CLIP with a LoRA": lambda s: under("base_model.model.", s | {"visual.proj.lora_A.default": torch.zeros(3)}),
    "a quantised CLIP": lambda s: s | {"transformer.resblocks.0.mlp.c_fc.SCB": torch.zeros(3)},
    "an image tower alone": lambda s: {key: v for key, v in to_transformers(s).items() if key.startswith("visi")},
    "a text tower alone": lambda s: {key: v for key, v in to_transformers(s).items() if key.startswith("text")},
    "a model of pictures or of texts alone": lambda _: {"model": {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_called_by_their_kind(kind, small, tmp_path):
    torch.save(OTHERS[kind](small), tmp_path / "other.pt")
    name = kind.split("|")[0]
    with pytest.raises(UserError, match=rf"^[^\n]*other.pt: These are the weights of {name}[^.]*use ViT-B/16\.$"):
        load_clip(tmp_path / "other.pt")


def of_dassl(state):
    """As Dassl saves a part of a trainer: its scheduler holds objects that torch.load refuses."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.002)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    return {"state_dict": state, "epoch": 50, "optimizer": optimizer.state_dict(),
            "scheduler": {"successor": successor, "last_epoch": 50}, "val_result": None}  # fmt: skip


PROMPTS = {
    "CoOp": of_dassl({"ctx": torch.zeros(16, 512), "token_prefix": torch.zeros(3, 1, 512)}),
    "VPT": of_dassl({"ctx": torch.zeros(12, 8, 768)}), "an adapter": of_dassl({"fc.0.weight": torch.zeros(3)}),
    "CoCoOp's state dict alone": {"meta_net.linear1.weight": torch.zeros(3, 3)},
    "a whole model of MaPLe": of_dassl({"prompt_learner.ctx": torch.zeros(2, 512), "logit_scale": torch.ones(()),
                                        "image_encoder.proj": torch.zeros(3)}),
    "prompts.pt": {"method": "upt", "classnames": ["cat"], "tensors": {"shared": torch.zeros(3)}},
}  # fmt: skip


@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts_are_called_so(kind, tmp_path):
    torch.save(PROMPTS[kind], tmp_path / "model.pth.tar-50")
    with pytest.raises(UserError, match=r"model.pth.tar-50: These are learned prompts and no CLIP: .*--prompts, .*\.$"):
        load_clip(tmp_path / "model.pth.tar-50")


def test_a_clip_without_its_scale_is_called_so(small, tmp_path):
    torch.save({key: value for key, value in small.items() if key != "logit_scale"}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt: These are the weights of a CLIP without its logit_scale"):
        load_clip(tmp_path / "other.pt")


def test_what_nobody_knows_is_told_by_its_keys(tmp_path):
    torch.save({"fc.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt: These are not .* no logit_scale .* the file has fc.weight, fc.bias"):
        load_clip(tmp_path / "other.pt")


def test_a_bias_that_is_not_0_is_refused(small):
    with pytest.raises(UserError, match="logit_bias"):
        CLIP.from_state_dict(small | {"logit_bias": torch.tensor(-10.0)})


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"epoch": 3, "model": module}])
def test_a_pickled_module_is_called_one(wrap, new, tmp_path):
    torch.save(wrap(nn.Sequential(nn.Linear(3, 3))), tmp_path / "module.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"module.pt: This looks like a pickled module.*Sequential.*state_dict\(\)"):
        load_clip(tmp_path / "module.pt")


def test_a_folder_without_weights_and_a_diffusion_pipeline_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} has no weights.*open_clip_model.safetensors"):
        load_clip(tmp_path)
    write(tmp_path / "model.safetensors.index.json", b"{}")
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} has its weights in several files"):
        load_clip(tmp_path)
    write(tmp_path / "model_index.json", b"{}")
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} is a diffusion pipeline"):
        load_clip(tmp_path)


def test_an_archive_whose_modules_contain_each_other_ends(file_of, tmp_path):
    """data.pkl: 30 modules, each with two references to the next, the last with two to the first: 2^30 ways."""
    path, modules = write(tmp_path / "loop.pt", file_of["torchscript"]), 30
    pickled = b"\x80\x02"
    for i in range(modules):  # every module by its class, put into the memo at place i
        pickled += b"c__torch__\nM\n)\x81q" + bytes([i])
    for i in range(modules):
        following = b"h" + bytes([(i + 1) % modules])
        pickled += b"h" + bytes([i]) + b"}(X\x01\x00\x00\x00a" + following + b"X\x01\x00\x00\x00b" + following + b"ub0"
    replace_in_zip(path, "/data.pkl", lambda _: pickled + b"h\x00.")
    with at_most(1_000_000), pytest.raises(UserError, match="loop.pt.*recursion"):
        load_clip(path)


# ---- The packages that write these forms agree ----

OTHER_HEADS = SMALL | dict(text_width=128)  # with four heads of 32 in both towers: only the configuration tells
CAPTIONS = ["a cat", "two dogs and a bird"]


def transformers_answers(state, folder):
    """transformers' own model of these weights, saved by it in folder -> image and text features."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    layers = dict(num_hidden_layers=1, num_attention_heads=4, hidden_size=128, intermediate_size=512, hidden_act="gelu")
    config = transformers.CLIPConfig(
        text_config=layers | dict(vocab_size=49408), vision_config=layers | dict(image_size=32, patch_size=16),
        projection_dim=64)  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    weights = {key: value for key, value in to_transformers(state).items() if "position_ids" not in key}
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    features = model.get_image_features(pixel_values=example()), model.get_text_features(input_ids=tokenize(CAPTIONS))
    return [getattr(x, "pooler_output", x) for x in features]


def open_clip_answers(state, folder):
    """open_clip's own model of these weights, as its training writes it -> image and text features."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install open_clip_torch")
    vision = dict(layers=1, width=128, head_width=32, patch_size=16, image_size=32)
    text = dict(layers=1, width=128, heads=4)
    model = open_clip.model.CLIP(64, vision, text).eval()
    model.load_state_dict(state)
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "a run", "state_dict": weights}, folder / "epoch_1.pt")
    config = {"model_cfg": dict(embed_dim=64, vision_cfg=vision, text_cfg=text)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model.encode_image(example()), model.encode_text(tokenize(CAPTIONS))


PACKAGES = {"transformers": (transformers_answers, ""), "open_clip": (open_clip_answers, "epoch_1.pt")}


def example():
    return random_numbers(random.Random(1), 2, 3, 32, 32)


def assert_features(clip, image, text):
    for ours, theirs in (clip.encode_image(example()), image), (clip.encode_text(tokenize(CAPTIONS)), text):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("package", PACKAGES)
def test_features_equal_the_ones_recorded_from_other_packages(package, tmp_path):
    recorded = json.loads((FIXTURES / "conversions.json").read_text())[package]
    state = random_state_dict(**OTHER_HEADS)
    if package == "transformers":
        torch.save(to_transformers(state), tmp_path / "pytorch_model.bin")
        write(tmp_path / "config.json", transformers_config(4, 4, "gelu"))
    else:
        torch.save(training_checkpoint(state), tmp_path / "open_clip_pytorch_model.bin")
        config = {"model_cfg": {"vision_cfg": {"width": 128, "head_width": 32}, "text_cfg": {"heads": 4}}}
        write(tmp_path / "open_clip_config.json", json.dumps(config).encode())
    assert_features(load_clip(tmp_path), torch.tensor(recorded["image"]), torch.tensor(recorded["text"]))


@pytest.mark.parametrize("package", PACKAGES)
def test_features_equal_other_packages_live(package, tmp_path):
    answers, file = PACKAGES[package]
    with torch.no_grad():
        image, text = answers(random_state_dict(**OTHER_HEADS), tmp_path)
    assert_features(load_clip(tmp_path / file), image, text)


def record():
    """Ask the packages once; the answers go to tests/fixtures."""
    answers = {}
    for package, (ask, _) in PACKAGES.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            image, text = ask(random_state_dict(**OTHER_HEADS), Path(folder))
        answers[package] = {key: [[float(f"{v:.8g}") for v in row] for row in rows.tolist()]
                            for key, rows in dict(image=image, text=text).items()}  # fmt: skip
    (FIXTURES / "conversions.json").write_text(json.dumps(answers) + "\n")


# ---- Downloads ----


class Server:
    """A host on this machine: path -> content, or a function that answers; `requests` lists the paths asked for."""

    def __init__(self):
        self.files, self.requests, self.cut, self.wait = {}, [], None, threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        self.requests.append(request.path)
        content = self.files.get(request.path)
        if content is None:
            return request.send_error(404)
        if callable(content):
            return content(request)
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[: self.cut])  # with cut: the connection closes before the end


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.wait.set()
    server.http.shutdown()
    server.http.server_close()


HUB_VARIABLES = ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "HF_TOKEN",
                 "TRANSFORMERS_OFFLINE"]  # fmt: skip


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The hub on the local server, with an empty home. Nothing is served yet: see server.files."""
    for name in HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    server.cache = tmp_path / ".cache" / "clip"
    return server


def below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def serve(hub, repository, files, revision="main"):
    hub.files |= {f"/{repository}/resolve/{revision}/{file}": content for file, content in files.items()}


OPENAI_B16 = "timm/vit_base_patch16_clip_224.openai"
OPEN_CLIP_CONFIG = json.dumps({"model_cfg": {"vision_cfg": {"width": 128}, "text_cfg": {"heads": 1}}}).encode()


def openai_repository(hub, content):
    serve(hub, OPENAI_B16, {"open_clip_config.json": OPEN_CLIP_CONFIG, "open_clip_model.safetensors": content})


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-B-16"])
def test_a_name_is_fetched_once_and_kept(name, hub, file_of):
    openai_repository(hub, file_of["safetensors"])
    clip = load_clip(name)
    assert same(clip, CLIP.from_state_dict(random_state_dict(**SMALL, vocab=20)))
    assert clip.activation == "quickgelu"  # which that repository's name says
    assert below(hub.cache) == [f"{OPENAI_B16}/open_clip_config.json", f"{OPENAI_B16}/open_clip_model.safetensors"]
    hub.requests.clear()
    load_clip(name)
    assert hub.requests == []


@pytest.mark.parametrize("file", ["ViT-B-16.pt", "ViT-B-16.safetensors", f"{OPENAI_B16}/open_clip_model.safetensors"])
def test_a_file_put_there_by_hand_or_by_openais_package_is_used(file, hub, file_of):
    write(hub.cache / file, file_of["torchscript"])
    assert load_clip("ViT-B/16").activation == "quickgelu"
    assert hub.requests == []


def test_a_repository_of_open_clip_is_fetched_with_its_configuration(hub, file_of):
    model = dict(vision_cfg=dict(width=128, head_width=32), text_cfg=dict(heads=1))
    config = json.dumps({"model_cfg": model}).encode()
    serve(hub, "laion/CLIP-B", {"open_clip_config.json": config, "open_clip_model.safetensors": file_of["safetensors"]})
    for _ in range(2):
        clip = load_clip("laion/CLIP-B")
        assert clip.activation == "gelu" and clip.visual.blocks[0].attn.heads == 4
    assert len(hub.requests) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_repository_of_transformers_is_fetched_with_its_configuration(file, hub, state, tmp_path):
    save = save_safetensors if file.endswith("safetensors") else torch.save
    save(to_transformers(state), tmp_path / file)
    config = transformers_config(1, 2, "gelu")
    serve(hub, "openai/clip-b", {file: (tmp_path / file).read_bytes(), "config.json": config})
    clip = load_clip("openai/clip-b")
    assert same(clip, CLIP.from_state_dict(state, text_heads=1))
    assert (clip.activation, clip.visual.blocks[0].attn.heads) == ("gelu", 2)
    assert below(hub.cache) == ["openai/clip-b/config.json", f"openai/clip-b/{file}"]


def test_a_repository_without_weights_lists_what_was_looked_for(hub):
    with pytest.raises(UserError, match="some/one .*open_clip_model.safetensors.*pytorch_model.bin"):
        load_clip("some/one")


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b""], ids=["a page", "nothing"])
def test_an_answer_that_is_not_weights_is_rejected_and_not_kept(content, hub):
    openai_repository(hub, content)
    with pytest.raises(UserError, match="not a whole weights file"):
        load_clip("ViT-B/16")
    assert below(hub.cache) == [f"{OPENAI_B16}/open_clip_config.json"]


def test_a_configuration_that_is_not_json_is_rejected_and_not_kept(hub, file_of):
    openai_repository(hub, file_of["safetensors"])
    serve(hub, OPENAI_B16, {"open_clip_config.json": b'{"model_cfg": {'})
    with pytest.raises(UserError, match="open_clip_config.json could not be fetched"):
        load_clip("ViT-B/16")
    assert below(hub.cache) == []


def test_the_weights_of_something_else_are_rejected_and_not_kept(hub, tmp_path):
    save_safetensors({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other")
    openai_repository(hub, (tmp_path / "other").read_bytes())
    with pytest.raises(UserError, match="not the weights of a CLIP ViT"):
        load_clip("ViT-B/16")
    assert below(hub.cache) == [f"{OPENAI_B16}/open_clip_config.json"]


@pytest.mark.parametrize("form", ["safetensors", "gzipped_safetensors", "state_dict", "torchscript"])
def test_weights_cut_on_the_way_are_found_and_the_next_call_starts_anew(form, hub, file_of):
    openai_repository(hub, file_of[form])
    serve(hub, OPENAI_B16, {"open_clip_config.json": b"{}"})
    hub.cut = len(file_of[form]) - 1
    with pytest.raises(UserError, match=f"only {hub.cut} of {len(file_of[form])} bytes came"):
        load_clip("ViT-B/16")
    hub.cut = None
    load_clip("ViT-B/16")
    assert (hub.cache / OPENAI_B16 / "open_clip_model.safetensors").read_bytes() == file_of[form]


def test_a_failed_download_says_what_to_put_where_by_hand(hub):
    serve(hub, OPENAI_B16, {"open_clip_config.json": lambda request: request.send_error(503)})
    with pytest.raises(UserError) as error:
        load_clip("ViT-B/16")
    message, file = str(error.value), "open_clip_config.json"
    for word in (f"{hub.url}/{OPENAI_B16}/resolve/main/{file}", "503", "by hand", "curl", "HF_ENDPOINT",
                 "pip install huggingface_hub", str(hub.cache / OPENAI_B16 / file)):
        assert word in message
    assert "\n" not in message


def test_no_network_at_all_is_one_sentence_too(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1/")
    with pytest.raises(UserError, match="refused.*by hand"):
        load_clip("ViT-B/16")


@pytest.mark.parametrize("name", ["ViT-B/16", "laion/CLIP-B"])
def test_where_the_home_cannot_be_written_the_cause_and_another_place_are_named(hub, tmp_path, monkeypatch, name):
    home = write(tmp_path / "file", b"")
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(UserError) as error:
        load_clip(name)
    message = str(error.value)
    assert re.fullmatch(rf"{re.escape(str(home))}/\.cache/clip/\S+ cannot be written \(Not a directory\): set HOME, on "
                        "Windows USERPROFILE, to another folder, or give a weights file with --backbone.", message)
    assert not hub.requests


def test_a_disk_that_is_full_is_named_as_such(hub, monkeypatch):
    monkeypatch.setattr(downloads, "fetch", fail_with(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="is full .No space left on device.: make room, or set HOME"):
        load_clip("ViT-B/16")
    assert below(hub.cache) == []


def fail_with(error):
    def fail(*_, **__):
        raise error
    return fail


def test_a_home_that_may_not_be_read_or_is_not_known_hides_no_file_of_ones_own(file_of, tmp_path, monkeypatch):
    path = write(tmp_path / "my.pt", file_of["state_dict"])
    monkeypatch.setattr(Path, "is_file", fail_with(PermissionError(13, "Permission denied")))
    monkeypatch.setattr(Path, "home", fail_with(RuntimeError("Could not determine home directory.")))
    monkeypatch.chdir(tmp_path)
    assert weights.find_weights(str(path), check=None) == path
    write(tmp_path / ".cache" / "clip" / "ViT-B-16.pt", file_of["state_dict"])
    assert weights.find_weights("ViT-B/16", check=None).resolve() == tmp_path / ".cache" / "clip" / "ViT-B-16.pt"


# ---- huggingface_hub ----


class FakeHub:
    """In place of the package: {repository: {file: content}}, a cache, and what was asked of it."""

    def __init__(self, folder):
        self.files, self.folder, self.asked, self.commit, self.offline = {}, folder, [], "c0ffee", False
        self.package, self.utils = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.utils")
        self.package.hf_hub_download, self.package.utils = self.download, self.utils
        self.package.try_to_load_from_cache = self.look_up
        self.utils.EntryNotFoundError = type("EntryNotFoundError", (Exception,), {})
        self.utils.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (self.utils.EntryNotFoundError,), {})

    def place(self, repository, file, commit):
        return self.folder / f"models--{repository.replace('/', '--')}" / "snapshots" / commit / file

    def look_up(self, repository, file):
        path = self.place(repository, file, "c0ffee")
        return str(path) if path.exists() else object() if file.endswith(".bin") else None

    def download(self, repository, file, revision=None):
        self.asked.append((repository, file, revision))
        commit = revision or self.commit
        path = self.place(repository, file, commit)
        if self.offline:
            raise self.utils.LocalEntryNotFoundError("Cannot find the requested files\nin the disk cache")
        if repository not in self.files:
            raise RuntimeError(f"401 Client Error: {repository} is gated")
        if file not in self.files[repository]:
            raise self.utils.EntryNotFoundError("404 Client Error")
        write(path, self.files[repository][file])
        self.commit = "decaf"  # somebody pushes to it meanwhile
        return str(path)


@pytest.fixture
def package(hub, tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "huggingface")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake.package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", fake.utils)
    return fake


@pytest.mark.parametrize("name, repository", [("laion/CLIP-B", "laion/CLIP-B"), ("ViT-B/16", OPENAI_B16)])
def test_the_package_fetches_all_and_both_files_are_of_one_commit(name, repository, package, hub, file_of):
    config = json.dumps({"model_cfg": dict(vision_cfg=dict(width=128, head_width=32), text_cfg=dict(heads=1))}).encode()
    package.files[repository] = {"open_clip_config.json": config, "open_clip_model.safetensors": file_of["safetensors"]}
    for _ in range(2):
        clip = load_clip(name)
        assert (clip.activation, clip.visual.blocks[0].attn.heads) == ("gelu" if "/C" in name else "quickgelu", 4)
    assert package.asked == [(repository, "open_clip_config.json", None),
                             (repository, "open_clip_model.safetensors", "c0ffee")]  # fmt: skip
    assert hub.requests == [] and not hub.cache.exists()


def test_the_name_of_a_repository_in_the_packages_cache_tells_quickgelu(package, file_of):
    package.files["some/ViT-quickgelu"] = {"open_clip_config.json": OPEN_CLIP_CONFIG,
                                           "open_clip_model.safetensors": file_of["safetensors"]}  # fmt: skip
    assert load_clip("some/ViT-quickgelu").activation == "quickgelu"


def test_what_the_package_cannot_fetch_is_one_sentence(package, hub):
    package.files["some/one"] = {"config.json": b"{}"}
    with pytest.raises(UserError, match="some/one on the hub has none of open_clip_model.safetensors"):
        load_clip("some/one")
    with pytest.raises(UserError, match=r"some/gated \(401[^\n]*by hand.$") as error:
        load_clip("some/gated")
    assert str(hub.cache / "some/gated") in str(error.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", fail_with(PermissionError(13, "denied")))
        with pytest.raises(UserError, match=r"some/one \([^\n]*denied[^\n]*\): set HF_HOME to another folder.$"):
            load_clip("some/one")
    package.offline = True
    with pytest.raises(UserError, match=r"some/other \(Cannot find the requested files in the disk cache\)"):
        load_clip("some/other")


# ---- The hub's cache, and what the hub's variables say ----

CACHES = {  # variables -> where the cache lies below the home
    "the usual place": ({}, ".cache/huggingface/hub"), "HF_HOME": ({"HF_HOME": "~/hf"}, "hf/hub"),
    "HF_HUB_CACHE": ({"HF_HOME": "~/hf", "HF_HUB_CACHE": "~/c"}, "c"),
    "its older name": ({"HUGGINGFACE_HUB_CACHE": "~/c"}, "c"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "~/x"}, "x/huggingface/hub"),
}


def cache_snapshot(cache, repository, files, commit="c0ffee"):
    """As huggingface_hub does: each file is a link to its content, and refs/main names the commit."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    write(folder / "refs" / "main", commit.encode())
    (folder / "snapshots" / commit).mkdir(parents=True)
    for file, content in files.items():
        write(folder / "blobs" / sha256(content), content)
        (folder / "snapshots" / commit / file).symlink_to(f"../../blobs/{sha256(content)}")
    return folder / "snapshots" / commit


@pytest.fixture
def usual_cache(hub, tmp_path):
    return tmp_path / ".cache" / "huggingface" / "hub"


@pytest.mark.parametrize("place", CACHES)
def test_weights_in_the_hubs_cache_are_used_without_a_network(place, hub, file_of, tmp_path, monkeypatch):
    variables, below_home = CACHES[place]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cache_snapshot(tmp_path / below_home, "laion/CLIP-B",
                   {"open_clip_config.json": OPEN_CLIP_CONFIG, "open_clip_model.safetensors": file_of["safetensors"]})
    for offline in "0", "1":
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert load_clip("laion/CLIP-B").activation == "gelu"
    assert hub.requests == [] and not hub.cache.exists()


def test_openais_models_are_found_where_open_clip_and_transformers_put_them(usual_cache, hub, file_of, state, tmp_path):
    save_safetensors(to_transformers(state), tmp_path / "file")
    of_transformers = {"model.safetensors": (tmp_path / "file").read_bytes(),
                       "config.json": transformers_config(1, 2, "quick_gelu")}  # fmt: skip
    cache_snapshot(usual_cache, "openai/clip-vit-base-patch16", of_transformers)
    cache_snapshot(usual_cache, "timm/vit_large_patch14_clip_224.openai", {"open_clip_model.safetensors":
                                                                           file_of["safetensors"]})
    assert same(load_clip("ViT-B/16"), CLIP.from_state_dict(state, text_heads=1))
    assert same(load_clip("ViT-L-14"), CLIP.from_state_dict(random_state_dict(**SMALL, vocab=20)))
    assert hub.requests == []


def test_an_image_tower_that_timm_left_in_the_cache_is_not_taken(usual_cache, hub, file_of):
    cache_snapshot(usual_cache, OPENAI_B16, {"model.safetensors": b"an image tower", "config.json": b"{}"})
    openai_repository(hub, file_of["safetensors"])
    load_clip("ViT-B/16")
    assert len(hub.requests) == 2


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_cached_weights_without_their_configuration_get_it_from_their_commit(file, usual_cache, hub, file_of):
    """open_clip fetches the weights alone. Without the configuration their activation is not known."""
    snapshot = cache_snapshot(usual_cache, "laion/CLIP-B", {file: file_of["safetensors"]})
    serve(hub, "laion/CLIP-B", {"open_clip_config.json": OPEN_CLIP_CONFIG}, revision="c0ffee")
    assert load_clip("laion/CLIP-B").activation == "gelu"
    assert hub.requests == ["/laion/CLIP-B/resolve/c0ffee/open_clip_config.json"]
    assert below(snapshot) == sorted(["open_clip_config.json", file])


@pytest.mark.parametrize("reference", [b"decaf", b"\xff", b"", b"../../.."], ids=repr)
def test_a_cache_that_is_not_whole_is_as_none(reference, usual_cache, hub, file_of):
    cache_snapshot(usual_cache, OPENAI_B16, {"open_clip_model.safetensors": file_of["safetensors"]})
    write(usual_cache / f"models--{OPENAI_B16.replace('/', '--')}" / "refs" / "main", reference)
    openai_repository(hub, file_of["safetensors"])
    load_clip("ViT-B/16")
    assert len(hub.requests) == 2


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_nothing_is_fetched_and_one_sentence_says_what_lacks(value, usual_cache, hub, file_of, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    openai_repository(hub, file_of["safetensors"])
    with pytest.raises(UserError, match=f"^{OPENAI_B16} is not in the hub's cache, and HF_HUB_OFFLINE .*by hand") as e:
        load_clip("ViT-B/16")
    assert str(hub.cache / OPENAI_B16) in str(e.value)
    snapshot = cache_snapshot(usual_cache, "laion/CLIP-B", {"open_clip_pytorch_model.bin": file_of["safetensors"]})
    file = snapshot / "open_clip_pytorch_model.bin"
    with pytest.raises(UserError, match=f"^{file} lacks open_clip_config.json .*HF_HUB_OFFLINE .*--activation"):
        load_clip("laion/CLIP-B")
    assert load_clip(file, activation="gelu").activation == "gelu" and hub.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    load_clip("ViT-B/16")


def test_the_token_goes_to_the_hub_and_not_where_it_redirects_to(hub, file_of, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    elsewhere, seen = Server(), []

    def answer(content):
        def give(request):
            seen.append(request.headers["Authorization"])
            request.send_response(200)
            request.end_headers()
            request.wfile.write(content)

        return give

    elsewhere.files = {"/weights": answer(file_of["safetensors"])}
    serve(hub, OPENAI_B16, {"open_clip_config.json": answer(OPEN_CLIP_CONFIG),
                            "open_clip_model.safetensors": redirect(f"{elsewhere.url}/weights")})  # fmt: skip
    load_clip("ViT-B/16")
    elsewhere.http.shutdown()
    elsewhere.http.server_close()
    assert seen == ["Bearer hf_secret", None]


@pytest.mark.parametrize("code", [401, 403])
def test_a_repository_behind_a_licence_asks_for_a_token(code, hub):
    serve(hub, "some/gated", {"open_clip_config.json": lambda request: request.send_error(code)})
    with pytest.raises(UserError, match=rf"^{hub.url} does not give some/gated .*HTTP {code}.*licence.*HF_TOKEN"):
        load_clip("some/gated")


def test_a_mirror_without_its_scheme_is_named(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.example")
    with pytest.raises(UserError, match="HF_ENDPOINT is hf-mirror.example.*write https://hf-mirror.example"):
        load_clip("ViT-B/16")


def test_the_real_package_fetches_once_and_then_works_offline(server, file_of, tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"

    def answer_with(content):
        def answer(request):
            request.send_response(200)
            request.send_header("Content-Length", str(len(content)))
            request.send_header("ETag", f'"{sha256(content)}"')
            request.send_header("X-Repo-Commit", commit)
            request.end_headers()
            if request.command == "GET":
                request.wfile.write(content)

        return answer

    config = json.dumps({"model_cfg": dict(vision_cfg=dict(width=128, head_width=32), text_cfg=dict(heads=1))}).encode()
    for revision in "main", commit:
        place = f"/laion/CLIP-B/resolve/{revision}"
        server.files[f"{place}/open_clip_config.json"] = answer_with(config)
        server.files[f"{place}/open_clip_pytorch_model.bin"] = answer_with(file_of["state_dict"])
    program = ("import sys; from clip_min import load_clip; clip = load_clip('laion/CLIP-B'); "
               "print(clip.activation, clip.visual.blocks[0].attn.heads)")  # fmt: skip
    without = program.replace("import sys;", "import sys; sys.modules['huggingface_hub'] = None;")
    environment = os.environ | dict(HOME=str(tmp_path), HF_ENDPOINT=server.url, HF_HUB_DISABLE_TELEMETRY="1",
                                    PYTHONPATH=os.pathsep.join(["", *sys.path]))  # fmt: skip
    for name in HUB_VARIABLES:
        environment.pop(name, None)

    def ask(program, **variables):
        return subprocess.run([sys.executable, "-c", program], env=environment | variables, capture_output=True,
                              text=True)  # fmt: skip

    for words, offline in (program, "0"), (program, "1"), (without, "1"):  # the last reads the cache of the first
        done = ask(words, HF_HUB_OFFLINE=offline)
        assert done.stdout.split() == ["gelu", "4"], done.stderr
        server.files = {}
    assert re.search("UserError: other/CLIP-B on the hub has none of", ask(program.replace("laion", "other")).stderr)
    done = ask(program.replace("laion", "other"), HF_HUB_OFFLINE="1")
    assert re.search("UserError: huggingface_hub could not fetch other/CLIP-B [^\n]*by hand", done.stderr)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_download_is_verified_and_put_in_place(server, tmp_path):
    server.files, path = {"/f": b"hello"}, tmp_path / "new" / "f"
    download(f"{server.url}/f", path, "sha256", sha256(b"hello"))
    assert path.read_bytes() == b"hello" and below(tmp_path) == ["new/f"]


def test_a_file_that_is_there_is_never_fetched_again(server, tmp_path):
    path = write(tmp_path / "f", b"older")
    download(f"{server.url}/f", path, "sha256", "0" * 64)
    assert path.read_bytes() == b"older" and server.requests == []


@pytest.mark.parametrize("cut", [0, 1, 150_000, 299_999])
def test_a_connection_that_closes_early_is_found_with_and_without_a_digest(cut, server, tmp_path):
    content = os.urandom(300_000)
    server.files, server.cut = {"/f": content}, cut
    for digest in ("sha256", sha256(content)), (None, None):
        with pytest.raises(UserError, match=f"/f could not be fetched .only {cut} of 300000 bytes came."):
            download(f"{server.url}/f", tmp_path / "f", *digest)
    assert below(tmp_path) == []


def test_a_file_whose_length_the_host_does_not_say_is_taken_to_its_end(server, tmp_path):
    def answer(request):
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b"hello")

    server.files = {"/f": answer}
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"hello"


def test_another_content_is_found_by_the_digest(server, tmp_path):
    server.files = {"/f": b"hullo"}
    with pytest.raises(UserError, match="/f could not be fetched .*sha256"):
        download(f"{server.url}/f", tmp_path / "f", "sha256", sha256(b"hello"))
    assert below(tmp_path) == []


def test_a_git_blob_id_verifies_a_download(server, tmp_path):
    server.files = {"/f": b"hello\n"}
    download(f"{server.url}/f", tmp_path / "f", "git", "ce013625030ba8dba906f756967f9e9ca394464a")  # git hash-object
    assert (tmp_path / "f").read_bytes() == b"hello\n"
    with pytest.raises(UserError, match="git hash 0000"):
        download(f"{server.url}/f", tmp_path / "g", "git", "0" * 40)
    assert below(tmp_path) == ["f"]


def test_a_check_may_refuse_a_download(server, tmp_path):
    server.files = {"/f": b"hello"}

    def check(part):
        raise UserError(f"{part.read_bytes()} is not it")

    with pytest.raises(UserError, match="hello.* is not it"):
        download(f"{server.url}/f", tmp_path / "f", check=check)
    assert below(tmp_path) == []


def redirect(target):
    def answer(request):
        request.send_response(302)
        request.send_header("Location", target)
        request.end_headers()

    return answer


@pytest.mark.parametrize("content", [
    None, redirect("/f"), redirect("http://[::1"), redirect("nowhere://x"), redirect("http://127.0.0.1:1/"),
    lambda request: request.send_error(416), lambda request: request.wfile.write(b"no HTTP at all\r\n\r\n"),
    lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nhello"), lambda request: None,
], ids=["404", "a loop", "a bad address", "an unknown scheme", "a closed port", "416", "no HTTP", "no length",
        "nothing"])  # fmt: skip
def test_every_bad_answer_is_one_sentence_and_leaves_nothing(content, server, tmp_path):
    server.files = {"/f": content}
    with pytest.raises(UserError, match=f"^{server.url}/f could not be fetched [^\n]*$"):
        download(f"{server.url}/f", tmp_path / "f", "sha256", sha256(b"hello"))
    assert below(tmp_path) == []


@pytest.mark.parametrize(
    "url", ["nowhere://x", "no address", "http://[::1/f", "http://no such host/f", "file:///nowhere"])
def test_a_bad_address_is_one_sentence(url, tmp_path):
    with pytest.raises(UserError, match="could not be fetched"):
        download(url, tmp_path / "f")


def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch):
    def answer(request):
        request.send_response(200)
        request.send_header("Content-Length", "10")
        request.end_headers()
        request.wfile.write(b"hello")
        server.wait.wait(30)

    server.files = {"/f": answer}
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    with pytest.raises(UserError, match="timed out"):
        download(f"{server.url}/f", tmp_path / "f")
    assert below(tmp_path) == []


def test_two_processes_may_fetch_the_same_file(server, tmp_path):
    """Two threads stand for them: both hold their whole part at the same time."""
    both, content = threading.Barrier(2, timeout=300), os.urandom(300_000)
    server.files = {"/f": content}

    def fetch():
        download(f"{server.url}/f", tmp_path / "f", check=lambda part: both.wait())

    with ThreadPoolExecutor() as pool:
        for result in [pool.submit(fetch), pool.submit(fetch)]:
            result.result()
    assert (tmp_path / "f").read_bytes() == content and below(tmp_path) == ["f"]


def test_temporary_files_of_killed_processes_are_cleared_and_those_of_running_ones_stay(server, tmp_path):
    for name, hours in {"f.0123abcd.part.77.partial": 2, "f.4567abcd.part": 0, "other.part1.zip": 2}.items():
        os.utime(write(tmp_path / name, b"x"), (time.time() - 3600 * hours,) * 2)
    server.files = {"/f": b"hello"}
    download(f"{server.url}/f", tmp_path / "f")
    assert below(tmp_path) == ["f", "f.4567abcd.part", "other.part1.zip"]


def test_a_temporary_file_that_another_process_renames_meanwhile_is_no_hindrance(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [tmp_path / "f.0123abcd.part"])
    server.files = {"/f": b"hello"}
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"hello"


def test_a_folder_that_cannot_be_made_is_one_sentence(server, tmp_path):
    server.files = {"/f": b"hello"}
    write(tmp_path / "taken", b"a file where a folder should be")
    with pytest.raises(UserError, match="taken"):
        download(f"{server.url}/f", tmp_path / "taken" / "f")


# ---- What the machine lacks is not the file's fault ----

MACHINE = {
    "memory": MemoryError(), "PyTorch's memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    "permission": PermissionError(13, "Permission denied"), "the disk": OSError(5, "Input/output error"),
}  # fmt: skip


@pytest.mark.parametrize("form, module, place", [
    ("safetensors", weights, "read_safetensors"), ("gzipped_safetensors", weights, "read_safetensors"),
    ("torchscript", weights, "load_torchscript"), ("safetensors", weights, "openai_keys"),
    ("safetensors", torch.Tensor, "float")])
@pytest.mark.parametrize("lack", MACHINE)
def test_a_file_that_the_machine_cannot_read_is_not_called_broken(
        lack, form, module, place, file_of, tmp_path, monkeypatch):
    def fail(*_):
        raise MACHINE[lack]

    path = write(tmp_path / "whole", file_of[form])
    monkeypatch.setattr(module, place, fail)
    with pytest.raises(UserError, match="whole cannot be read on this machine") as error:
        load_clip(path)
    assert not re.search("not a whole|not the weights|download", str(error.value))
    assert path.exists()


@pytest.mark.parametrize("lack", MACHINE)
def test_a_download_that_the_machine_cannot_read_is_kept(lack, hub, file_of, monkeypatch):
    openai_repository(hub, file_of["safetensors"])
    with monkeypatch.context() as patch:
        patch.setattr(weights, "read_safetensors", lambda _: (_ for _ in ()).throw(MACHINE[lack]))
        with pytest.raises(UserError, match="open_clip_model.safetensors cannot be read on this machine"):
            load_clip("ViT-B/16")
    hub.requests.clear()
    load_clip("ViT-B/16")
    assert hub.requests == []


# ---- Time and memory ----



def measure(path):
    """Load a CLIP in a process of its own, and write how many megabytes were read, and by how many its memory grew."""
    def of_this_process(file, name):
        return next(int(line.split()[1]) for line in (Path("/proc/self") / file).open() if line.startswith(name))

    before, start = of_this_process("status", "VmHWM"), of_this_process("io", "rchar")  # kilobytes, bytes
    load_clip(path)
    read, grown = of_this_process("io", "rchar") - start, of_this_process("status", "VmHWM") - before
    path.with_name("measured").write_text(f"{read / 1e6} {grown / 1e3}")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the peak and what is read come from Linux's /proc")
def test_a_large_archive_is_read_once_and_in_twice_its_memory(tmp_path, monkeypatch):
    """ViT-B/16 with a third of its layers."""
    monkeypatch.setattr(random.Random, "randbytes", lambda _, number: b"0" * number)  # quickly
    state = random_state_dict(**B16 | dict(vision_layers=4, text_layers=4))
    save_torchscript({key: value.half() for key, value in state.items()}, tmp_path / "ViT-B-16.pt")
    size = (tmp_path / "ViT-B-16.pt").stat().st_size / 1e6
    assert size > 135
    assert call(measure, tmp_path / "ViT-B-16.pt") == 0
    (tmp_path / "ViT-B-16.pt").unlink()
    read, grown = map(float, (tmp_path / "measured").read_text().split())
    print(f"{size:.0f} MB: {read:.0f} MB read, peak {grown:.0f} MB")
    assert 0.95 * size < read < 1.05 * size
    assert size < grown < 2.2 * 2 * size  # fp32 parameters are twice as large as the file


if __name__ == "__main__" and sys.argv[1:] == ["--record"]:
    record()
