"""What a file of weights holds: the CLIP in it, in whatever company, or else the name of what it is instead.

support/weights.py calls require_known_form() before it reads a file, and find_clip() with what it has read. Whatever is
no CLIP, a set of keys around a logit_scale, is a UserError, one sentence that says what it is and what to do.
"""

import re

import torch

from clip_min import UserError
from support.archives import StandIn, class_of
from support.folders import shortened

PARTS = (  # what the keys of a CLIP begin with, in OpenAI's form, open_clip's CustomTextCLIP and transformers'
    "visual.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
    "logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "text.", "vision_model.",
    "text_model.", "visual_projection.",
)
OF_OTHERS = "bert.", "text_decoder."  # what else makes the keys around a logit_scale those of another model
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # PyTorch's, in any place
USUAL = "state_dict", "model", "model_state_dict"  # the dictionary to be taken where another has a copy, such as an EMA

IMAGE_TOWER, TEXT_TOWER = r"(^|\.)(vision_model|visual)\.", r"(^|\.)(text_model|token_embedding)\."
OTHER_TOWER = "a CLIP with another text tower, such as BERT or T5"
LOOKALIKES = {  # what the keys of other models contain, behind the prefix of the logit_scale if there is one
    r"(^|\.)visual\.layer1\.": "a ResNet CLIP",
    r"(^|\.)visual\.trunk\.": "a SigLIP or another CLIP with an image tower of timm's",
    r"(^|\.)vision_model\.head\.": "a SigLIP",
    r"diffusion_model\.|down_blocks\.": "a diffusion model",
    r"position(al)?_embedding_res": "a Long-CLIP, which has a second table of positions (positional_embedding_res)",
    r"conv1_alpha": "an Alpha-CLIP, which reads a mask beside the picture",
    r"\.(SCB|weight_format|qweight|absmax)$": "a quantised CLIP",
    r"(^|\.)lora_[AB]\.": "a CLIP with a LoRA that is not merged into it (peft's merge_and_unload() does that)",
    r"^bert\.": "a Chinese-CLIP, whose text tower is a BERT with its own vocabulary",
    r"(^|\.)(word_embeddings|roberta|text\.transformer\.(embeddings|encoder|shared))\.": OTHER_TOWER,
    r"(^|\.)text_decoder\.|visual\.attn_pool\.": "a CoCa or another model that writes captions",
    r"visual\.(patch_embed|rope|blocks\.\d+\.attn\.(q_|k_|v_|qkv))|visual\.cls_token":
        "an EVA-CLIP or another CLIP with an image tower other than OpenAI's",
}
WITHOUT_SCALE = LOOKALIKES | {  # what else it may be where there is no logit_scale between two towers
    TEXT_TOWER: "a text tower alone", IMAGE_TOWER: "an image tower alone",
    r"(^|\.)(blocks\.\d+\.attn\.qkv|layer1\.0\.conv1|encoder\.layer\.0)\.": "a model of pictures or of texts alone",
}
OTHER_FORMS = {  # how other files begin
    b"GGUF": "a file for llama.cpp (GGUF): give the model's safetensors or PyTorch file",
    b"\x89HDF": "a file for TensorFlow (HDF5): give the model's safetensors or PyTorch file",
    b"version https://git-lfs": "git-lfs's pointer to a file, and not the file: git lfs pull fetches it",
}
OTHER_VOCABULARIES = (21128, 30522, 32000, 32100, 32128)  # BERT's and T5's; multilingual ones are larger than CLIP's
LARGEST_VOCABULARY = 50_000  # CLIP's has 49,408 words; a training may have added some


def require_known_form(path):
    """UserError if the file begins as one of another program's."""
    with open(path, "rb") as file:
        start = file.read(100)
    for beginning, form in OTHER_FORMS.items():
        if start.startswith(beginning):
            raise UserError(f"This is {form}.")


def find_clip(content):
    """What was read from a file -> the CLIP's {key: tensor} without prefix, and the names of what was left out."""
    if isinstance(content, StandIn):
        raise pickled(content)
    leaves = flatten(content)
    prefixes = find_prefixes(leaves)
    if not prefixes:
        raise UserError(what_it_is(content, leaves))
    if len(prefixes) > 1:
        raise UserError("These are not the weights of a CLIP ViT: they are those of several, under "
                        f"{shortened(prefixes)}: save one.")
    prefix, state, left_out = prefixes[0], {}, {}
    names = [key.removeprefix(prefix) for key in leaves if key.startswith(prefix)]
    kind = look_alike([name for name in names if name.startswith(PARTS + OF_OTHERS)], LOOKALIKES)
    if kind:
        raise UserError(kind)
    for key, leaf in leaves.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name.startswith(PARTS) and isinstance(leaf, torch.Tensor):
            state[".".join(part for part in name.split(".") if part not in WRAPPERS)] = leaf
        else:
            left_out[beside(key, prefix)] = True
    require_own_vocabulary(state)
    return state, list(left_out)


def flatten(content):
    """Dictionaries in dictionaries -> {their keys, joined by dots: what is no dictionary}. Each is visited once."""
    if not isinstance(content, dict):
        raise UserError(f"These are not the weights of a CLIP ViT: the file holds a {type(content).__name__}.")
    leaves, waiting, seen = {}, [("", content)], set()
    while waiting:
        prefix, dictionary = waiting.pop()
        if id(dictionary) in seen:
            continue
        seen.add(id(dictionary))
        for key, value in dictionary.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value))
            else:
                leaves[f"{prefix}{key}"] = value
    return leaves


def find_prefixes(leaves):
    """-> what the keys of each CLIP begin with, such as "state_dict.module.", up to their logit_scale."""
    prefixes = [key.removesuffix("logit_scale") for key in leaves if key.split(".")[-1] == "logit_scale"]
    towers = ("visual.", "vision_model.")
    prefixes = [prefix for prefix in prefixes
                if any(key.startswith(tuple(prefix + tower for tower in towers)) for key in leaves)]
    usual = [prefix for prefix in prefixes if prefix.split(".")[0] in USUAL]
    return usual if len(prefixes) > 1 and len(usual) == 1 else prefixes


def beside(key, prefix):
    """The dictionary, module or entry that stands beside the CLIP and holds the key: "state_dict.loss"."""
    parts, path = key.split("."), prefix.split(".")
    depth = 0
    while depth < len(parts) - 1 and parts[depth] == path[depth]:
        depth += 1
    return ".".join(parts[: depth + 1])


def look_alike(keys, kinds):
    """-> the sentence about what has such keys, or None."""
    for pattern, kind in kinds.items():
        if any(re.search(pattern, key) for key in keys):
            return (f"These are the weights of {kind}, and only CLIPs with OpenAI's ViT and text tower are supported: "
                    "use ViT-B/16.")
    return None


def require_own_vocabulary(state):
    """UserError where texts are numbered otherwise than CLIP's tokenizer does: every result would be wrong."""
    for key in "token_embedding.weight", "text.token_embedding.weight", "text_model.embeddings.token_embedding.weight":
        words = len(state.get(key, ()))
        if words in OTHER_VOCABULARIES or words > LARGEST_VOCABULARY:
            raise UserError(f"These are the weights of a CLIP with another tokenizer, of {words} words where OpenAI's "
                            "has 49408 (MetaCLIP 2 and other multilingual ones have such): use ViT-B/16.")


def what_it_is(content, leaves):
    """-> the sentence about a file without a CLIP."""
    are_prompts = "val_result" in content or {"tensors", "classnames"} <= content.keys()  # of Dassl, or of train.py
    if are_prompts or any(re.search(r"(^|\.)(ctx|token_prefix|prompt_learner|meta_net)(\.|$)", key) for key in leaves):
        return ("These are learned prompts and no CLIP: give them to --prompts, and to --backbone the CLIP that they "
                "were learned with, such as ViT-B/16.")
    stand_ins = [leaf for leaf in leaves.values() if isinstance(leaf, StandIn)]
    tensors = [key for key, leaf in leaves.items() if isinstance(leaf, torch.Tensor)]
    if stand_ins and not tensors:
        return str(pickled(stand_ins[0]))
    if all(any(re.search(tower, key) for key in leaves) for tower in (IMAGE_TOWER, TEXT_TOWER)):
        return look_alike(leaves, LOOKALIKES) or (
            "These are the weights of a CLIP without its logit_scale: save the whole model's state_dict().")
    return look_alike(leaves, WITHOUT_SCALE) or (
        "These are not the weights of a CLIP ViT: no logit_scale stands beside the keys of an image tower, which begin "
        f"with visual or vision_model, and the file has {shortened(tensors) or 'no tensors'}.")


def pickled(stand_in):
    return UserError(f"This looks like a pickled module, it asks for {class_of(stand_in)}, and nothing of a file is "
                     "run: save the module's state_dict() where it was made.")
