"""What clip_min.py promises about weights: every form of file gives the same CLIP, nothing in a file is run, no broken
file gets through, and a download is resumed, verified and put in place only when whole. The files are made here, the
hosts are a server on this machine.
"""

import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import B16, TINY, openai_clip, random_state_dict
from torch import nn

import clip_min
from clip_min import CLIP, UserError, download, load_clip, tokenize

SMALL = TINY | dict(vision_layers=1, text_layers=1)
NAME = "ViT-B/32"  # the name whose sources the local server plays


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


@pytest.mark.parametrize("content", [
    b"", b"\0", b"\0" * 1000, b"not weights", b"<!DOCTYPE html><html><body>404: not found</body></html>",
    b'{"error": "Access to model is restricted"}', b'{"data":{"dtype": 1}}', b"\x1f\x8b", gzip.compress(b""),
    gzip.compress(b"hello"), b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"version https://git-lfs.github.com/spec/v1\n",
    (3).to_bytes(8, "little") + b"{}}", (2).to_bytes(8, "little") + b"{}", pickle.dumps(3), bytes(range(256)) * 9,
    (2**62).to_bytes(8, "little") + b"{}", b"\x89PNG\r\n\x1a\n{",
], ids=lambda content: ascii(content[:12]))  # fmt: skip
def test_what_is_not_weights_is_refused(content, tmp_path):
    with pytest.raises(UserError, match="page is not a whole weights file|not the weights of a CLIP ViT"):
        load_clip(write(tmp_path / "page", content))


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


def test_a_folder_is_not_a_weights_file(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_clip(tmp_path)


def test_a_path_may_begin_with_a_tilde(file_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "my.pt", file_of["state_dict"])
    assert load_clip("~/my.pt").encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


# ---- Downloads ----


class Server:
    """A host on this machine: path -> content; `requests` lists (path, Range header)."""

    def __init__(self):
        self.files, self.requests, self.ranges, self.cut = {}, [], True, None
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        asked = request.headers["Range"]
        self.requests.append((request.path, asked))
        content = self.files.get(request.path)
        if content is None:
            return request.send_error(404)
        begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if begin >= len(content) > 0 and begin:
            return request.send_error(416)
        request.send_response(206 if asked and self.ranges else 200)
        if asked and self.ranges:
            request.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - begin))
        request.end_headers()
        request.wfile.write(content[begin : self.cut])  # with cut: the connection closes before the end


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def hosts(server, file_of, tmp_path, monkeypatch):
    """Both sources of NAME on the local server, with an empty home. Nothing is served yet: see serve."""
    monkeypatch.setenv("HOME", str(tmp_path))
    sha256 = hashlib.sha256(file_of["torchscript"]).hexdigest()
    monkeypatch.setattr(clip_min, "HUB", server.url + "/hub/{}.safetensors")
    monkeypatch.setattr(clip_min, "OPENAI", server.url + "/openai/{}/{}.pt")
    monkeypatch.setattr(clip_min, "SOURCES", clip_min.SOURCES | {NAME: ("b32", sha256)})
    server.hub, server.openai = "/hub/b32.safetensors", f"/openai/{sha256}/ViT-B-32.pt"
    server.cache = tmp_path / ".cache" / "clip"
    return server


def cached(server):
    return sorted(path.name for path in server.cache.iterdir()) if server.cache.exists() else []


def test_a_name_is_fetched_from_the_first_source_and_kept(hosts, file_of):
    hosts.files = {hosts.hub: file_of["safetensors"], hosts.openai: file_of["torchscript"]}
    assert same(load_clip(NAME), CLIP.from_state_dict(random_state_dict(**SMALL, vocab=20)))
    assert [path for path, _ in hosts.requests] == [hosts.hub]
    assert cached(hosts) == ["ViT-B-32.safetensors"]
    assert (hosts.cache / "ViT-B-32.safetensors").read_bytes() == file_of["safetensors"]


def test_a_file_in_the_cache_is_used_without_a_request(hosts, file_of):
    hosts.files = {hosts.hub: file_of["safetensors"]}
    load_clip(NAME)
    hosts.requests.clear()
    load_clip(NAME)
    assert hosts.requests == []


@pytest.mark.parametrize("name", ["ViT-B-32.pt", "ViT-B-32.safetensors"])
def test_a_file_put_there_by_hand_or_by_openais_package_is_used(name, hosts, file_of):
    write(hosts.cache / name, file_of["torchscript"])
    load_clip(NAME)
    assert hosts.requests == []


def test_when_the_first_source_is_gone_the_second_serves(hosts, file_of):
    hosts.files = {hosts.openai: file_of["torchscript"]}
    assert same(load_clip(NAME), CLIP.from_state_dict(random_state_dict(**SMALL, vocab=20)))
    assert [path for path, _ in hosts.requests] == [hosts.hub, hosts.openai]
    assert cached(hosts) == ["ViT-B-32.pt"]


def test_a_wrong_hash_is_named_and_deleted(hosts, file_of):
    hosts.files = {hosts.openai: file_of["state_dict"]}  # good weights, but not the ones that the address promises
    with pytest.raises(UserError, match=f"sha256 hash {hosts.openai.split('/')[2]}"):
        load_clip(NAME)
    assert cached(hosts) == []


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b""], ids=["a page", "nothing"])
def test_an_answer_that_is_not_weights_is_rejected_and_not_kept(content, hosts):
    hosts.files = {hosts.hub: content}
    with pytest.raises(UserError, match="not a whole weights file"):
        load_clip(NAME)
    assert cached(hosts) == []


def test_the_weights_of_something_else_are_rejected_and_not_kept(hosts, tmp_path):
    save_safetensors({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other")
    hosts.files = {hosts.hub: (tmp_path / "other").read_bytes()}
    with pytest.raises(UserError, match="not the weights of a CLIP ViT"):
        load_clip(NAME)
    assert cached(hosts) == []


def test_a_pickle_that_is_not_weights_is_rejected_and_not_kept(hosts):
    buffer = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": {}}, buffer)
    hosts.files = {hosts.hub: buffer.getvalue()}
    with pytest.raises(UserError):
        load_clip(NAME)
    assert cached(hosts) == []


def test_when_both_sources_fail_the_message_says_what_to_put_where_by_hand(hosts):
    with pytest.raises(UserError) as error:
        load_clip(NAME)
    message = str(error.value)
    for word in (NAME, hosts.hub, hosts.openai, "404", "by hand"):
        assert word in message
    for name in ("ViT-B-32.safetensors", "ViT-B-32.pt"):
        assert str(hosts.cache / name) in message
    assert "\n" not in message


def test_no_network_at_all_is_one_sentence_too(hosts, monkeypatch):
    monkeypatch.setattr(clip_min, "HUB", "http://127.0.0.1:1/{}")
    monkeypatch.setattr(clip_min, "OPENAI", "http://127.0.0.1:1/{}/{}")
    with pytest.raises(UserError, match="refused.*by hand"):
        load_clip(NAME)


def test_a_cut_connection_keeps_the_part_and_the_next_call_resumes_it(server, tmp_path):
    content, path = os.urandom(300_000), tmp_path / "new" / "file.bin"
    server.files, server.cut = {"/f": content}, 100_000
    with pytest.raises(UserError, match="100000 of 300000"):
        download(f"{server.url}/f", path, "sha256", hashlib.sha256(content).hexdigest())
    assert not path.exists() and path.with_name("file.bin.part").stat().st_size == 100_000
    server.cut = None
    download(f"{server.url}/f", path, "sha256", hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content and not path.with_name("file.bin.part").exists()
    assert server.requests[1] == ("/f", "bytes=100000-")


def test_weights_cut_on_the_way_are_resumed_by_name(hosts, file_of):
    hosts.files, hosts.cut = {hosts.hub: file_of["safetensors"]}, 50_000
    with pytest.raises(UserError, match="50000 of"):
        load_clip(NAME)
    assert cached(hosts) == ["ViT-B-32.safetensors.part"]
    hosts.cut = None
    load_clip(NAME)
    assert (hosts.cache / "ViT-B-32.safetensors").read_bytes() == file_of["safetensors"]
    assert hosts.requests[-1] == (hosts.hub, "bytes=50000-")


def test_a_part_of_another_file_does_not_survive_the_hash(server, tmp_path):
    content = os.urandom(1000)
    server.files, path = {"/f": content}, tmp_path / "f"
    write(tmp_path / "f.part", b"x" * 400)
    with pytest.raises(UserError, match="sha256"):
        download(f"{server.url}/f", path, "sha256", hashlib.sha256(content).hexdigest())
    assert list(tmp_path.iterdir()) == []
    download(f"{server.url}/f", path, "sha256", hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content


def test_a_server_without_ranges_sends_the_whole_file_again(server, tmp_path):
    content = os.urandom(1000)
    server.files, server.ranges = {"/f": content}, False
    write(tmp_path / "f.part", content[:400])
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == content


def test_a_part_that_is_whole_already_is_verified_and_put_in_place(server, tmp_path):
    content = os.urandom(1000)
    server.files = {"/f": content}
    write(tmp_path / "f.part", content)
    download(f"{server.url}/f", tmp_path / "f", "sha256", hashlib.sha256(content).hexdigest())
    assert (tmp_path / "f").read_bytes() == content and server.requests == [("/f", "bytes=1000-")]


def test_a_git_blob_id_verifies_a_download(server, tmp_path):
    server.files = {"/f": b"hello\n"}
    download(f"{server.url}/f", tmp_path / "f", "git", "ce013625030ba8dba906f756967f9e9ca394464a")  # git hash-object
    assert (tmp_path / "f").read_bytes() == b"hello\n"
    with pytest.raises(UserError, match="git hash 0000.*deleted"):
        download(f"{server.url}/f", tmp_path / "g", "git", "0" * 40)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_check_may_refuse_a_download(server, tmp_path):
    server.files = {"/f": b"hello"}

    def check(part):
        raise UserError(f"{part.read_bytes()} is not it")

    with pytest.raises(UserError, match="hello.* is not it"):
        download(f"{server.url}/f", tmp_path / "f", check=check)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_page_leaves_nothing_behind(server, tmp_path):
    with pytest.raises(UserError, match="/f .*404"):
        download(f"{server.url}/f", tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_leaves_an_older_file_alone(server, tmp_path):
    write(tmp_path / "f", b"older")
    server.files = {"/f": b"newer, but wrong"}
    with pytest.raises(UserError):
        download(f"{server.url}/f", tmp_path / "f", "sha256", "0" * 64)
    assert (tmp_path / "f").read_bytes() == b"older"


def test_a_cache_folder_that_cannot_be_made_is_one_sentence(server, tmp_path):
    server.files = {"/f": b"hello"}
    write(tmp_path / "taken", b"a file where a folder should be")
    with pytest.raises(UserError, match="taken"):
        download(f"{server.url}/f", tmp_path / "taken" / "f")


# ---- Time and memory ----

MEASURE = """
import sys, time
import torch, clip_min

def peak():  # of this program alone: getrusage's ru_maxrss would begin with the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e3

clip_min.CLIP.from_state_dict  # imported, nothing read
before, start, cpu = peak(), time.perf_counter(), time.process_time()
clip = clip_min.load_clip(sys.argv[1])
seconds = min(time.perf_counter() - start, time.process_time() - cpu)  # the lower: other programs may be running
print(sum(p.numel() for p in clip.parameters()) / 1e6, seconds, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_an_archive_of_vit_b_16_is_read_in_3_seconds_and_twice_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.ones(shape, dtype=torch.float16))  # quickly
    state = {key: value.half() for key, value in random_state_dict(**B16).items()}
    save_torchscript(state, tmp_path / "ViT-B-16.pt")
    assert (tmp_path / "ViT-B-16.pt").stat().st_size > 299e6
    environment = os.environ | dict(PYTHONPATH=str(Path(clip_min.__file__).parent))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "ViT-B-16.pt")]
    for _ in range(3):  # one reading can meet a busy disk
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        millions, seconds, megabytes = map(float, output.split())
        if seconds < 3:
            break
    (tmp_path / "ViT-B-16.pt").unlink()
    print(f"ViT-B/16, {millions:.0f} M parameters from a TorchScript archive: {seconds:.2f} s, peak {megabytes:.0f} MB")
    assert millions > 149
    assert seconds < 3
    assert megabytes < 2.2 * 4 * millions
