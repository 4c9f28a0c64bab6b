"""What --prompts promises: learned tensors of earlier runs, and of the official code, give the logits of their method.

The folders of the official code are made here, as Dassl writes them, from small modules with the official names. What
the official code computes stands here once more, literally: prompts of full length, all tokens, layer by layer.
"""

import math
import os
import pickle
import shutil
import struct
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, random_clip, random_state_dict
from PIL import Image
from test_clip import assert_equal, picture, plain_block, plain_text
from test_train import draw, only_run, predictions, prompts, result, run_folders
from torch import nn

import data
import report
import train
from clip_min import UserError, encode, tokenize
from support import benchmarks, settings
from support.archives import StandIn
from support.foreign import read_file
from support.prompts import Learned, read_learned

NAMES = ["cat", "shovel-nosed_ray", "polka dotted", "ox"]
CTX_LEARNER, EXTRACTOR = "image_encoder.transformer.ctx_learner", "image_encoder.transformer.extractor"
SIZES = TINY | dict(vision_layers=3)
WIDTH, TEXT_WIDTH, JOINT = SIZES["vision_width"], SIZES["text_width"], SIZES["joint"]


# ---- The official code: modules with its names, and what they compute, in fp32 ----


class PromptLearner(nn.Module):
    """CoOp's, with its buffers, and with `meta` CoCoOp's."""

    def __init__(self, clip, names=NAMES, n_ctx=4, csc=False, meta=False):
        super().__init__()
        self.ctx = nn.Parameter(0.02 * torch.randn(*((len(names),) if csc else ()), n_ctx, TEXT_WIDTH))
        if meta:
            self.meta_net = nn.Sequential(OrderedDict(
                linear1=nn.Linear(JOINT, JOINT // 16), relu=nn.ReLU(), linear2=nn.Linear(JOINT // 16, TEXT_WIDTH)))
        names = [name.replace("_", " ") for name in names]
        self.tokens = tokenize([f"{'X ' * n_ctx}{name}." for name in names])
        self.lengths = [len(encode(name)) for name in names]
        embedding = clip.text.token_embedding(self.tokens)
        self.register_buffer("token_prefix", embedding[:, :1])
        self.register_buffer("token_suffix", embedding[:, 1 + n_ctx :])

    def features(self, clip, position="end", shift=0):
        """-> (K, E), every prompt encoded alone."""
        rows, half = [], self.ctx.shape[-2] // 2
        ctx = (self.ctx if self.ctx.dim() == 3 else self.ctx.expand(len(self.tokens), -1, -1)).to(shift) + shift
        for prefix, own, suffix, length in zip(self.token_prefix, ctx, self.token_suffix, self.lengths, strict=True):
            name, end = suffix[:length], suffix[length:]
            rows.append(torch.cat({"end": [prefix, own, name, end], "front": [prefix, name, own, end],
                                   "middle": [prefix, own[:half], name, own[half:], end]}[position]))
        return plain_text(clip, torch.stack(rows), self.tokens.argmax(dim=-1))


class CtxLearner(nn.Module):
    def __init__(self, layers, n_ctx=3):
        super().__init__()
        self.ctx = nn.Parameter(torch.randn(layers, n_ctx, WIDTH))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.kmlp, self.qmlp = nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32, bias=False)
        self.vmlp = nn.Linear(WIDTH, WIDTH, bias=False)


class Extractor(nn.Module):
    """DPT's class-aware prompts, which its code calls CAVPT."""

    def __init__(self, layers, names=NAMES, n_ctx=3):
        super().__init__()
        self.meta_nets = nn.ModuleList(nn.Linear(JOINT, WIDTH) for _ in range(layers))
        self.attns = nn.ModuleList(Attention() for _ in range(layers))
        self.lns, self.lns2 = (nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers)) for _ in range(2))
        self.classfiers = nn.ModuleList(nn.Linear(WIDTH, len(names), bias=False) for _ in range(layers))
        self.ctx = nn.Parameter(torch.randn(layers, n_ctx, WIDTH))
        for p in [p for ln in (*self.lns, *self.lns2) for p in ln.parameters()]:
            p.data += 0.1 * torch.randn(WIDTH)

    def forward(self, x, g, i):
        """x (B, 1+N, D), g (B, k, E) -> prompts (B, k, D)."""
        q = self.meta_nets[i](g)
        kv, attn = torch.cat([x, self.ctx[i].expand(len(x), -1, -1)], dim=1), self.attns[i]
        scores = attn.qmlp(q) @ attn.kmlp(kv).transpose(1, 2) / math.sqrt(32)
        return self.lns2[i](attn.vmlp(scores.softmax(dim=-1) @ kv) + q)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def image_features(clip, images, plain=(), extractor=None, g=None):
    """Prompts of the layers below, then class-aware ones -> (B, E)."""
    visual = clip.visual
    x = visual.embed(images)
    for layer, block in enumerate(visual.blocks):
        if layer < len(plain):
            extra = plain[layer].expand(len(x), -1, -1)
        else:
            extra = extractor(x, g, layer - len(plain)) if extractor else x[:, :0]
        x = plain_block(block, torch.cat([x, extra], dim=1))[:, : x.shape[1]]
    return visual.ln_post(x[:, 0]) @ visual.proj


class Official:
    """A trainer: its parts, and its logits."""

    def __init__(self, method, clip, names=NAMES, **options):
        torch.manual_seed(5)
        self.method, self.clip, self.parts = method, clip, {}
        self.position, self.w0 = options.pop("position", "end"), clip.classifier(names)
        below = options.pop("below", 2 if method == "dpt" else 3)
        if method in ("vpt", "vlp", "dpt"):
            self.parts[CTX_LEARNER] = CtxLearner(below)
        if method == "dpt":
            self.parts[EXTRACTOR] = Extractor(3 - below, options.pop("trained_on", names))
        if method != "vpt":
            self.parts["prompt_learner"] = PromptLearner(clip, names, meta=method == "cocoop", **options)

    @torch.no_grad()
    def logits(self, images):
        clip, text, plain = self.clip, self.parts.get("prompt_learner"), self.parts.get(CTX_LEARNER)
        z0, scale = clip.encode_image(images), clip.logit_scale.exp()
        if self.method == "cocoop":
            shifts = text.meta_net(unit(z0))
            return torch.cat([scale * unit(z)[None] @ unit(text.features(clip, shift=shift)).T
                              for z, shift in zip(z0, shifts, strict=True)])
        w = self.w0 if text is None else text.features(clip, self.position, torch.zeros(()))
        if self.method == "dpt":
            order = (scale * unit(z0) @ self.w0.T).argsort(dim=-1, descending=True)[:, :10]
            z = image_features(clip, images, plain.ctx, self.parts[EXTRACTOR], w[order])
        else:
            z = z0 if plain is None else image_features(clip, images, plain.ctx)
        return scale * unit(z) @ unit(w).T

    def save(self, folder, epochs=50, old=False, half=False):
        """As Dassl saves it, with an optimizer and a scheduler, which are objects."""
        for name, part in self.parts.items():
            optimizer = torch.optim.SGD(part.parameters(), lr=0.002, momentum=0.9)
            sum(p.square().sum() for p in part.parameters()).backward()
            optimizer.step()
            successor, tensors = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), part.state_dict()
            if half:
                tensors = OrderedDict((key, tensor.half()) for key, tensor in tensors.items())
                for key, p in part.named_parameters():  # with what they have lost
                    p.data.copy_(tensors[key])
            state = dict(state_dict=tensors, epoch=epochs, optimizer=optimizer.state_dict(),
                         scheduler=dict(warmup_epoch=1, successor=successor), val_result=None)
            (folder / name).mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / name / f"model.pth.tar-{epochs}", _use_new_zipfile_serialization=not old)
            (folder / name / "checkpoint").write_text(f"model.pth.tar-{epochs}\n")
        return folder


@pytest.fixture
def clip():
    return random_clip(**SIZES)


def take_over(folder, method, clip, names=NAMES, **options):
    """-> our method with the tensors of a folder or file."""
    learned, method_class = read_learned(folder, method), train.METHODS[method]
    options = learned.options(method_class.default_options()) | options
    method = method_class(clip, names, **options)
    settings = SimpleNamespace(backbone="", shots=16, templates=method.templates, options=options)
    learned.put_into(method, SimpleNamespace(classnames=names, class_ids=None), settings)
    return method


OUTPUTS = {  # what the official code was trained with, and what the command has to say of it
    "coop": ("coop", {}, {}), "coop in the middle": ("coop", dict(position="middle"), "middle"),
    "coop in front": ("coop", dict(position="front", n_ctx=5), "front"),
    "coop csc": ("coop", dict(csc=True), {}),
    "coop csc in the middle": ("coop", dict(csc=True, position="middle"), "middle"),
    "coop 16": ("coop", dict(n_ctx=16), {}), "prograd": ("prograd", dict(n_ctx=16), {}), "cocoop": ("cocoop", {}, {}),
    "cocoop 6": ("cocoop", dict(n_ctx=6), {}), "vpt": ("vpt", {}, {}), "vlp": ("vlp", {}, {}), "dpt": ("dpt", {}, {}),
    "dpt in two layers": ("dpt", dict(below=1), {}), "dpt in all layers": ("dpt", dict(below=0), {}),
}  # fmt: skip


@pytest.fixture(params=OUTPUTS)
def output(request, clip):
    method, made_with, position = OUTPUTS[request.param]
    return Official(method, clip, **made_with), dict(class_token_position=position) if position else {}


@pytest.mark.parametrize("half", [False, True])
def test_an_official_output_folder_gives_the_official_logits(half, precision, output, clip, tmp_path):
    official, options = output
    official.save(tmp_path, old=not half, half=half)
    images = picture(32, 4)
    assert_equal(take_over(tmp_path, official.method, clip, **options)(images), official.logits(images))


# ---- Which files ----


@pytest.fixture
def coop(clip, tmp_path):
    """An output folder of CoOp's."""
    return Official("coop", clip).save(tmp_path / "output")


def ctx(path, method="coop"):
    return read_learned(path, method).tensors["ctx"]


def test_a_part_and_a_single_file_are_taken_too(coop, tmp_path):
    file = coop / "prompt_learner" / "model.pth.tar-50"
    alone = Path(shutil.copy(file, tmp_path / "downloaded.bin"))
    for path in coop / "prompt_learner", file, alone:
        assert torch.equal(ctx(path), ctx(coop))


def test_keys_of_several_gpus_lose_their_module(coop):
    expected, file = ctx(coop), coop / "prompt_learner" / "model.pth.tar-50"
    content = torch.load(file, weights_only=False)  # this test made it, with an optimizer and a scheduler
    torch.save(content | dict(state_dict={f"module.{key}": t for key, t in content["state_dict"].items()}), file)
    assert torch.equal(ctx(coop), expected)


def test_an_archive_of_the_folder_is_one_sentence(coop, tmp_path):
    path = shutil.make_archive(tmp_path / "published", "zip", coop)
    with pytest.raises(UserError, match="an archive with 0 files data.pkl, unpack other archives first"):
        read_learned(path, "coop")


def test_the_last_epoch_is_taken_and_the_best_where_there_is_no_other(clip, coop):
    part = coop / "prompt_learner"
    last = ctx(coop)
    shutil.copy(part / "model.pth.tar-50", part / "model.pth.tar-100")
    Official("coop", clip, n_ctx=6).save(coop, epochs=9)  # what was trained last, as `checkpoint` says
    assert len(ctx(coop)) == 6
    (part / "checkpoint").unlink()  # then the number decides, not the alphabet
    assert torch.equal(ctx(coop), last)
    for file in part.glob("model.pth.tar-*"):
        file.rename(part / "model-best.pth.tar")
    assert ctx(coop).dim() == 2


OTHER_FILES = {
    "another method's folder": ("vpt", {}, "coop", "give --method vpt"),
    "more parts than the method has": ("vlp", {}, "coop", "give --method vlp"),
    "fewer parts than the method has": ("coop", {}, "dpt", "give --method coop or cocoop or prograd"),
    "a tensor of another method": ("cocoop", {}, "coop", "it is of cocoop"),
    "a method without official files": ("coop", {}, "upt", "read for coop, cocoop, prograd, vpt, vlp, dpt only"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_files_of_another_method_are_one_sentence_that_names_it(case, clip, tmp_path):
    made_by, options, method, sentence = OTHER_FILES[case]
    Official(made_by, clip, **options).save(tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        read_learned(tmp_path, method)
    assert str(tmp_path) in str(error.value) and str(error.value).endswith(".")


def test_a_folder_of_runs_lists_them(clip, tmp_path):
    for seed in 1, 2:
        Official("coop", clip).save(tmp_path / f"seed{seed}")
    with pytest.raises(UserError, match=f"give one of {tmp_path}/seed1, {tmp_path}/seed2"):
        read_learned(tmp_path, "coop")


def test_one_part_of_several_asks_for_the_folder(clip, tmp_path):
    Official("dpt", clip).save(tmp_path)
    for path in tmp_path / EXTRACTOR, tmp_path / EXTRACTOR / "model.pth.tar-50":
        with pytest.raises(UserError, match="give the folder that has these"):
            read_learned(path, "dpt")


def not_finite(part):
    part["state_dict"]["ctx"][0, 0] = math.inf


def one_number(part):
    part["state_dict"]["ctx"] = torch.tensor(1.0)


@pytest.mark.parametrize(("change", "sentence"), [
    (not_finite, "numbers in ctx that are not finite"), (one_number, "ctx that is one number"),
    (lambda part: part.pop("state_dict"), "no learned tensors under state_dict"),
    (lambda part: part.update(state_dict={}), "no learned tensors under state_dict"),
    (lambda part: part["state_dict"].update(ctx="words"), "no learned tensors under state_dict"),
    (lambda part: part["state_dict"].update(ctx=StandIn), "no learned tensors under state_dict"),
])
def test_what_holds_no_prompts_is_one_sentence(change, sentence, coop):
    file = coop / "prompt_learner" / "model.pth.tar-50"
    content = torch.load(file, weights_only=False)  # this test made it, with an optimizer and a scheduler
    change(content)
    torch.save(content, file)
    with pytest.raises(UserError, match=sentence):
        read_learned(coop, "coop")


@pytest.mark.parametrize("content", [b"", b"noise", b"PK\3\4", pickle.dumps(3), pickle.dumps([1])], ids=repr)
def test_any_other_file_is_one_sentence(content, tmp_path):
    (tmp_path / "model.pth.tar-50").write_bytes(content)
    for path in tmp_path, tmp_path / "model.pth.tar-50":
        with pytest.raises(UserError, match="model.pth.tar-50 is no whole file of torch.save"):
            read_learned(path, "coop")


@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_is_cut_off_is_one_sentence(old, clip, tmp_path):
    file = Official("coop", clip).save(tmp_path, old=old) / "prompt_learner" / "model.pth.tar-50"
    content = file.read_bytes()
    for length in range(0, len(content) - 8, len(content) // 40):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match="is no whole file of torch.save"):
            read_learned(tmp_path, "coop")


def test_a_byte_that_changed_is_noticed_where_the_format_has_checksums(coop):
    file = coop / "prompt_learner" / "model.pth.tar-50"
    content, place = file.read_bytes(), file.read_bytes().index(ctx(coop).numpy().tobytes()[:16])
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match="is damaged"):
        read_learned(coop, "coop")


def test_a_path_that_does_not_exist_or_cannot_be_read_is_one_sentence(coop, monkeypatch):
    with pytest.raises(UserError, match="nowhere of --prompts does not exist"):
        read_learned(coop / "nowhere", "coop")
    monkeypatch.setattr(Path, "iterdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match="cannot be used .Permission denied."):
        read_learned(coop, "coop")


# ---- Nothing of a file is run ----


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("function", [os.mkdir, eval, exec, nn.Linear], ids=lambda function: function.__name__)
def test_no_code_in_a_file_is_run(function, old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "__import__('os').mkdir('made')"
    arguments = {os.mkdir: ["made"], nn.Linear: [10**6, 10**7]}.get(function, [code])
    bombs = [Bomb(function, *arguments), {"deep": (Bomb(function, *arguments),)}]
    torch.save(dict(state_dict=dict(ctx=torch.ones(2, 3)), scheduler=bombs, optimizer=bombs[0]), "x.pt",
               _use_new_zipfile_serialization=not old)
    content = read_file("x.pt")
    assert torch.equal(content["state_dict"]["ctx"], torch.ones(2, 3)) and isinstance(content["optimizer"], StandIn)
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt"}


@pytest.mark.parametrize("old", [False, True])
def test_every_kind_of_tensor_is_read_as_it_was_saved(old, tmp_path):
    numbers = torch.arange(12)
    tensors = {str(dtype): numbers.to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool)}
    tensors |= {"view": numbers[3:7], "transposed": numbers.view(3, 4).T, "empty": numbers[:0].view(0, 5),
                "scalar": numbers[5], "parameter": nn.Parameter(torch.ones(2))}
    torch.save(dict(tensors=tensors, others=[1, "a", None, (2.5, {3: 4})]), tmp_path / "x.pt",
               _use_new_zipfile_serialization=not old)
    content = read_file(tmp_path / "x.pt")
    assert content["others"] == [1, "a", None, (2.5, {3: 4})] and content["tensors"].keys() == tensors.keys()
    for name, tensor in content["tensors"].items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype, name


class HalfStorage:
    """Under torch.cuda's name it stands in old files for the storage of a tensor on a GPU."""


def test_a_file_of_pytorch_0_4_from_a_gpu_is_read(tmp_path):
    """Storages of torch.cuda, a part of a storage, tensors without a version: nothing writes this today."""
    values = torch.arange(10).half()

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing):
            return (torch._utils._rebuild_tensor, (HalfStorage(), 1, (2,), (2,))) if thing is values else NotImplemented

        def persistent_id(self, thing):
            return ("storage", HalfStorage, "7", "cuda:0", 10, ("8", 4, 5)) if type(thing) is HalfStorage else None

    file = tmp_path / "model.pth.tar-50"
    with file.open("wb") as stream:
        for head in 0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True):
            pickle.dump(head, stream, protocol=2)
        Pickler(stream, protocol=2).dump(dict(state_dict=dict(ctx=values)))
        pickle.dump(["7"], stream, protocol=2)
        stream.write(struct.pack("<q", 10) + values.numpy().tobytes())
    file.write_bytes(file.read_bytes().replace(f"c{__name__}\n".encode(), b"ctorch.cuda\n"))
    assert read_file(file)["state_dict"]["ctx"].tolist() == [5, 7]


# ---- What does not fit, and what fits by its shape alone ----


@pytest.mark.parametrize(("method", "made_with", "sizes", "names", "sentence"), [
    ("coop", dict(csc=True), {}, NAMES[:3], "ctx is 4 x 4 x 64 there and 3 x 4 x 64 here"),
    ("coop", {}, dict(text_width=128), NAMES, "ctx is 4 x 64 there and 4 x 128 here"),
    ("vpt", {}, dict(vision_layers=4), NAMES, "visual_prompts is 3 x 3 x 128 there and 4 x 3 x 128 here"),
    ("vlp", {}, dict(vision_width=192), NAMES, "visual_prompts is 3 x 3 x 128 there and 3 x 3 x 192 here"),
    ("dpt", {}, dict(joint=32), NAMES, "cavpt.0.fc.weight is 128 x 64 there and 128 x 32 here"),
    ("cocoop", {}, dict(joint=32), NAMES, "meta_net.0.weight is 4 x 64 there and 2 x 32 here"),
])
def test_what_does_not_fit_is_one_sentence(method, made_with, sizes, names, sentence, clip, tmp_path):
    Official(method, clip, **made_with).save(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} does not fit this \w+ \({sentence}\): give the --back") as error:
        take_over(tmp_path, method, random_clip(**SIZES | sizes), names)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_key_is_one_sentence(clip, tmp_path):
    official = Official("dpt", clip)
    del official.parts[EXTRACTOR].lns2
    official.save(tmp_path)
    with pytest.raises(UserError, match="cavpt.0.ln_p.weight is missing there and 128 here"):
        take_over(tmp_path, "dpt", clip)


def test_an_option_of_the_command_that_does_not_fit_is_one_sentence(coop, clip):
    with pytest.raises(UserError, match="ctx is 4 x 64 there and 8 x 64 here"):
        take_over(coop, "coop", clip, n_ctx=8)


def test_dpts_parts_must_have_as_many_prompts(clip, tmp_path):
    official = Official("dpt", clip)
    official.parts[CTX_LEARNER] = CtxLearner(2, n_ctx=7)
    official.save(tmp_path)
    with pytest.raises(UserError, match=r"\(2, 7, 128\) and \(1, 3, 128\) in its two parts"):
        read_learned(tmp_path, "dpt")


@pytest.mark.parametrize("left_out", [False, True])
def test_dpts_auxiliary_classifier_may_be_that_of_other_classes(left_out, clip, tmp_path):
    official = Official("dpt", clip, trained_on=NAMES * 5)
    if left_out:
        del official.parts[EXTRACTOR].classfiers
    official.save(tmp_path)
    assert_equal(take_over(tmp_path, "dpt", clip)(picture(32, 2)), official.logits(picture(32, 2)))


@pytest.mark.parametrize(("method", "shapes", "options"), [
    ("coop", dict(ctx=(16, 512)), dict(n_ctx=16, csc=False)), ("coop", dict(ctx=(9, 4, 512)), dict(n_ctx=4, csc=True)),
    ("cocoop", dict(ctx=(4, 512)), dict(n_ctx=4)), ("cocoop", dict(ctx=(5, 512)), dict(n_ctx=5, ctx_init="")),
    ("vpt", dict(visual_prompts=(12, 8, 768)), dict(n_visual=8, deep=True)),
    ("vpt", dict(visual_prompts=(1, 8, 768)), dict(n_visual=8, deep=False)),
    ("dpt", {"ctx": (16, 512), "visual_prompts": (12, 10, 768), "cavpt.0.fc.weight": (768, 512)},
     dict(n_ctx=16, n_visual=10)),
    ("dpt", {"ctx": (16, 512), "visual_prompts": (24, 10, 768), "cavpt.0.fc.weight": (768, 512)},
     dict(n_ctx=16, n_visual=10, cavpt_layers="24-24")),
    ("dpt", {"ctx": (16, 512), "visual_prompts": (12, 10, 768), "cavpt.0.fc.weight": (768, 512),
             "cavpt.1.fc.weight": (768, 512)}, dict(n_ctx=16, n_visual=10, cavpt_layers="11-12")),
], ids=str)  # fmt: skip
def test_options_are_read_from_the_shapes(method, shapes, options):
    learned = Learned(Path("output"), {name: torch.zeros(shape) for name, shape in shapes.items()}, {}, {})
    found, defaults = learned.options(train.METHODS[method].default_options()), dict(csc=False, ctx_init="")
    assert found == {name: value for name, value in defaults.items() if name in found} | options


def test_prompts_of_another_clip_are_taken_with_a_warning(coop, clip, capsys):
    take_over(coop, "coop", clip)
    assert "warning" not in capsys.readouterr().err
    take_over(coop, "coop", random_clip(**SIZES, seed=9))
    assert f"warning: {coop} was learned with another CLIP" in capsys.readouterr().err


@pytest.mark.parametrize("half", [False, True])
def test_contexts_of_the_classes_own_are_taken_for_other_classes_with_a_warning(half, clip, tmp_path, capsys):
    Official("coop", clip, csc=True).save(tmp_path, half=half)
    take_over(tmp_path, "coop", clip)
    assert "warning" not in capsys.readouterr().err
    take_over(tmp_path, "coop", clip, names=[*NAMES[:3], "a red cup"])
    assert "1 of the 4 classes were called otherwise where it was learned: a red cup" in capsys.readouterr().err


# ---- Runs ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures, weights, and runs of several methods on them, which tests only read."""
    folder = tmp_path_factory.mktemp("world")
    draw(folder / "photos", 12)
    draw(folder / "shifted", 4)
    draw(folder / "others", 4, ["green", "red", "violet"])
    torch.save(random_state_dict(**SIZES), folder / "weights.pt")
    for options in RUNS.values():
        assert train.main(flags(folder, "--out", folder / "runs", "--epochs", 1, *options)) == 0
    return folder


RUNS = {
    "coop": ["--method", "coop"], "coop csc": ["--method", "coop", "--set", "csc=true", "n_ctx=2"],
    "vpt": ["--method", "vpt", "--set", "deep=false"], "dpt": ["--method", "dpt"],
    "dpt 2-3": ["--method", "dpt", "--set", "cavpt_layers=2-3"],
    "cavpt": ["--method", "cavpt"], "upt": ["--method", "upt"], "fgvpl": ["--method", "fgvpl"],
    "tip-f": ["--method", "fgvpl", "--set", "parts=tip-f"], "cocoop": ["--method", "cocoop"],
    "prograd": ["--method", "prograd"], "proda": ["--method", "proda"], "clip_adapter": ["--method", "clip_adapter"],
    "linear_probe": ["--method", "linear_probe"], "zeroshot": ["--method", "zeroshot"],
}  # fmt: skip


def flags(world, *words):
    usual = ["--data", world / "photos", "--backbone", world / "weights.pt", "--shots", 4, "--device", "cpu"]
    return [str(word) for word in (*usual, *words)]


def folder_of(world, name):
    method = RUNS[name][1]
    options = {word.split("=")[0]: word.split("=")[1] for word in RUNS[name][3:]}
    (found,) = [folder for folder in run_folders(world / "runs") if result(folder)["method"] == method
                and {key: value for key, value in result(folder)["changed"].items() if key != "epochs"} == options]
    return found


@pytest.fixture
def evaluate(world, tmp_path):
    """-> a function that runs train.py with --prompts and more -> the run's folder."""
    def run(method, path, *more):
        assert train.main(flags(world, "--method", method, "--out", tmp_path / "runs", "--prompts", path, *more)) == 0
        return only_run(tmp_path / "runs")
    return run


@pytest.mark.parametrize("name, as_file", [*((name, False) for name in RUNS), ("dpt", True), ("tip-f", True)])
def test_the_prompts_of_a_run_give_its_predictions(name, as_file, world, evaluate, capsys):
    first = folder_of(world, name)
    again = evaluate(RUNS[name][1], first / "prompts.pt" if as_file else first)
    assert predictions(again) == predictions(first) and result(again)["accuracy"] == result(first)["accuracy"]
    assert result(again)["prompts"] == str(first / "prompts.pt" if as_file else first) and not result(again)["losses"]
    assert result(again)["options"] == result(first)["options"] and result(again)["recipe"] == {}
    assert prompts(again)["tensors"].keys() == prompts(first)["tensors"].keys()
    assert report.main([str(again), "--device", "cpu"]) == 0
    assert report.main([str(again), "--eval-on", str(world / "photos"), "--device", "cpu"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_run_with_official_prompts_is_a_run_as_any_other(name, clip, world, evaluate, tmp_path, capsys):
    method, made_with, position = OUTPUTS[name]
    classes = ["blue", "green", "red"]
    official = Official(method, clip, classes, **made_with)
    official.save(tmp_path / "seed1", half=True)
    position = ["--set", f"class_token_position={position}"] if position else []
    run = evaluate(method, tmp_path / "seed1", *position, "--eval-on", world / "shifted", "--variance")
    out = capsys.readouterr().out
    assert "zero-shot " in out and "accuracy  " in out and "learning" not in out and "last epoch" not in out
    assert result(run)["prompts"] == str(tmp_path / "seed1") and "prompts=seed1-" in run.parent.name
    loaded = train.load_run(run, "cpu")
    assert loaded.classnames == classes
    assert_equal(loaded(picture(32, 3)), official.logits(picture(32, 3)))
    assert report.main([str(run), "--device", "cpu"]) == 0


def test_a_run_is_called_by_what_the_tensors_hold(clip, world, evaluate, tmp_path):
    classes = ["blue", "green", "red"]
    first, second = (Official("coop", clip, classes) for _ in range(2))
    second.parts["prompt_learner"].ctx.data += 1
    first.save(tmp_path / "a/seed1"), second.save(tmp_path / "c/seed1")
    for copied in "b/seed1", "d/seed2":
        shutil.copytree(tmp_path / "a/seed1", tmp_path / copied)
    names = [read_learned(tmp_path / path, "coop").name for path in ("a/seed1", "b/seed1", "c/seed1", "d/seed2")]
    assert names[0] == names[1] != names[2] and names[0].startswith("seed1-") and names[3].startswith("seed2-")
    assert evaluate("coop", tmp_path / "a/seed1").parent.name == f"coop,n_ctx=4,prompts={names[0]}"


def test_the_table_has_the_run_and_zero_shot_clip_once(world, evaluate, capsys):
    evaluate("coop", folder_of(world, "coop"))
    out = evaluate("coop", folder_of(world, "coop")).parents[2]
    assert train.main(flags(world, "--method", "zeroshot", "--out", out)) == 0
    assert "finished " in capsys.readouterr().out  # the second time nothing is done
    assert report.main(["--out", str(out)]) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 and rows[2] == "| zeroshot" and rows[3].startswith("| coop prompts=weights-")


def test_nothing_is_trained_so_that_no_training_pictures_are_needed(world, evaluate, monkeypatch):
    load = data.load
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr(data, "load", lambda *args, **options: replace(load(*args, **options), train=[], val=[]))
    assert result(evaluate("coop", folder_of(world, "coop")))["train_images"] == 0


@pytest.mark.parametrize("name", ["coop", "dpt", "vpt", "upt"])
def test_prompts_are_tested_on_other_classes_and_the_run_can_be_loaded(name, world, evaluate, capsys):
    run = evaluate(RUNS[name][1], folder_of(world, name), "--data", world / "others")
    method = train.load_run(run, "cpu")
    assert method.classnames == ["green", "red", "violet"]
    first = train.load_run(folder_of(world, name), "cpu").for_classes(method.classnames)
    assert_equal(method(picture(32, 3)), first(picture(32, 3)))
    assert report.main([str(run), "--eval-on", str(world / "others"), "--device", "cpu"]) == 0


@pytest.mark.parametrize("name", ["coop csc", "fgvpl", "tip-f", "linear_probe"])
def test_what_belongs_to_its_classes_is_refused_for_others(name, world, tmp_path, capsys):
    words = ["--method", RUNS[name][1], "--prompts", folder_of(world, name), "--data", world / "others"]
    assert train.main(flags(world, *words, "--out", tmp_path / "runs")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ") and not run_folders(tmp_path / "runs")


def test_an_empty_path_never_trains_and_a_folder_of_runs_lists_them(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # an empty path is this folder
    for path, said in ("", "has no part of a trainer"), (world / "runs", f"give one of {world / 'runs'}"):
        assert train.main(flags(world, "--method", "coop", "--out", tmp_path / "runs", "--prompts", path)) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_base_to_new_tests_both_halves(clip, world, evaluate, tmp_path, capsys):
    official = Official("coop", clip, ["blue", "green"])
    run = evaluate("coop", official.save(tmp_path / "output"), "--base-to-new")
    assert result(run)["base_to_new"].keys() == {"base", "new", "harmonic_mean"} and result(run)["classes"] == 2
    assert "new classes" in capsys.readouterr().out and "base_to_new=true,prompts=output-" in run.parent.name
    words = ["--method", "coop", "--base-to-new", "--prompts", folder_of(world, "coop"), "--out", tmp_path / "more"]
    assert train.main(flags(world, *words)) == 0  # of a run on all classes
    csc = Official("coop", clip, ["blue", "green"], csc=True).save(tmp_path / "csc")
    assert train.main(flags(world, *words[:3], "--prompts", csc, "--out", tmp_path / "more")) == 2


def test_pictures_that_a_run_was_trained_on_are_not_tested_in_another_folder(world, evaluate, tmp_path, capsys):
    moved = tmp_path / "moved"
    for path in prompts(folder_of(world, "coop"))["train"]:  # here they are test pictures
        (moved / "test" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "photos" / path, moved / "test" / path)
    for path in (world / "shifted").rglob("*.png"):
        for part in "test", "train":
            new = moved / part / path.parent.name / f"new{path.name}"
            new.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).rotate(180).save(new)
    run = evaluate("coop", folder_of(world, "coop"), "--data", moved)
    assert "12 of 24 test pictures" in capsys.readouterr().err and result(run)["test_images"] == 12
    assert len(prompts(run)["train"]) == 12  # which its own reports leave out as well


@pytest.mark.parametrize(("saved", "said"), [
    (dict(backbone="ViT-B/32"), "backbone ViT-B/32"), (dict(shots=2), "shots 2")])
def test_a_run_on_another_backbone_or_with_other_shots_is_taken_with_a_warning(saved, said, world, evaluate, tmp_path,
                                                                               capsys):
    path = tmp_path / "changed.pt"
    torch.save(prompts(folder_of(world, "coop")) | saved, path)
    evaluate("coop", path)
    assert f"warning: {path} was learned with {said}, and this run has " in capsys.readouterr().err


@pytest.mark.parametrize(("change", "sentence"), [
    (dict(method="vpt"), "is a run of vpt: give --method vpt"),
    (dict(tensors={}), "ctx is missing there and 16 x 64 here"),
    (dict(backbone="left out"), "is not a prompt file of train.py"),
    (dict(tensors=dict(ctx=3)), "is not a prompt file"),
    (dict(options=3), "is not a prompt file"),
])
def test_a_prompt_file_with_nonsense_in_it_is_one_sentence(change, sentence, world, tmp_path, capsys):
    saved = prompts(folder_of(world, "coop")) | change
    torch.save({key: value for key, value in saved.items() if value != "left out"}, tmp_path / "prompts.pt")
    words = flags(world, "--method", "coop", "--out", tmp_path / "runs", "--prompts", tmp_path)
    assert train.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and sentence in err and str(tmp_path) in err


def published(method, path, *words):
    args = train.parse_arguments(["--prompts", str(path), "--backbone", "ViT-B/16", *words])
    return [accuracy for accuracy, _ in benchmarks.published(
        settings.resolve_settings(args, train.METHODS, "dtd", method, 16, 1), "dtd")]


def test_the_papers_numbers_stand_beside_where_the_tensors_have_the_papers_setting(clip, tmp_path):
    for method, n_ctx, found in ("coop", 16, [69.6]), ("coop", 4, []), ("vlp", 16, [72.2]), ("dpt", 16, [72.65]):
        official = Official(method, clip, n_ctx=n_ctx)
        if method != "coop":
            official.parts[CTX_LEARNER] = CtxLearner(3 if method == "vlp" else 2, n_ctx=10)
        if method == "dpt":
            official.parts[EXTRACTOR].ctx = nn.Parameter(torch.zeros(1, 10, WIDTH))
        path = official.save(tmp_path / f"{method} {n_ctx}")
        assert published(method, path) == found
    assert published("coop", tmp_path / "coop 16", "--set", "class_token_position=front") == []
