"""The tokenizer inside a GGUF <-> tokenizer.json and tokenizer_config.json.

Byte-level BPE (llama.cpp's model `gpt2`) both ways, SentencePiece's BPE (`llama`, of Llama 2 and its kin) in alone.

A GGUF has tokens, merges and special tokens as they are, but only a name for the rule that cuts a text into pieces; the rules
are those of llama.cpp's src/llama-vocab.cpp, in the form that the published tokenizer.json have. Where llama.cpp's own form is
an approximation of that one (`llama4` and letters with marks), ids follow the published tokenizer.

What one side cannot express is left out with a warning, so that the weights remain readable.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from llama4_jax.checkpoints.gguf_config import Metadata
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError

TOKENIZER, TOKENIZER_CONFIG, GENERATION, TEMPLATE = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
_LONGEST_PIECE = 64  # letters of a token that is taken apart; SentencePiece itself ends at 16
_SPACE = "\u2581"  # what SentencePiece writes for a space


class _Cut(NamedTuple):
    """How text is cut into pieces before merging."""

    split: str | None  # a regular expression; None: GPT-2's, with or without each digit apart
    digits: bool = False
    whole: bool = False  # a piece that is a token needs no merges


_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA4 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = _Cut(None), _Cut(None, digits=True)
_LLAMA3, _SMAUG = _Cut(rf"{_WORDS}|\p{{N}}{{1,3}}{_END}", whole=True), _Cut(rf"{_WORDS}|\p{{N}}{{1,3}}{_END}")
_QWEN2, _GPT4O = _Cut(rf"{_WORDS}|\p{{N}}{_END}"), _Cut(_LLAMA4)
_CUTS = {  # tokenizer.ggml.pre; of names for one rule, the first is written
    "gpt-2": _GPT2, "mpt": _GPT2, "olmo": _GPT2, "phi-2": _GPT2, "exaone4": _GPT2, "trillion": _GPT2,
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS, "codeshell": _DIGITS, "exaone": _DIGITS,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3, "pixtral": _LLAMA3, "lfm2": _LLAMA3,
    "smaug-bpe": _SMAUG, "dbrx": _SMAUG, "chatglm-bpe": _SMAUG,
    "qwen2": _QWEN2, "stablelm2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "megrez": _QWEN2,
    "llama4": _GPT4O, "gpt-4o": _GPT4O,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------
# Reading


def files_from_gguf(metadata: Metadata, config: ModelConfig) -> dict[str, bytes]:
    """The files of a Hugging Face folder that say what the metadata say of tokens, chat and generation.

    Raises:
        UserError: the tokens contradict themselves. A tokenizer of another kind is left out, with a warning.
    """
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    files = {GENERATION: _json(generation)}
    kind, cut = metadata.get("tokenizer.ggml.model", "none", str), metadata.get("tokenizer.ggml.pre", "absent", str)
    if kind in ("none", "no_vocab"):
        return files
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and cut not in _CUTS):
        which = f"tokenizer.ggml.pre {cut!r}" if kind == "gpt2" else f"tokenizer.ggml.model {kind!r}"
        warnings.warn(f"{metadata.path}: {which} is not known: the tokenizer is left out", stacklevel=3)
        return files
    tokens = metadata.get("tokenizer.ggml.tokens", None, list)
    special = {name: _special(metadata, name, tokens) for name in ("bos", "eos", "unknown", "padding")}
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or _CUTS[cut] is _LLAMA3, bool)
    adds_bos = adds_bos and special["bos"] is not None
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special["bos"],
        "eos_token": special["eos"],
        "unk_token": special["unknown"],
        "pad_token": special["padding"],
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "chat_template": metadata.optional("tokenizer.chat_template", str),
    }
    vocabulary, added = _vocabulary(metadata, tokens)
    rules = _sentencepiece(metadata, vocabulary) if kind == "llama" else _byte_level_bpe(metadata, vocabulary, _CUTS[cut])
    bos = special["bos"] if adds_bos else None
    files[TOKENIZER] = _json(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **rules}
        | {"post_processor": _begins_with(bos, vocabulary.get(bos))}
    )
    try:
        tokenizers.Tokenizer.from_buffer(files[TOKENIZER])
    except Exception as error:  # what the library raises is a bare Exception
        raise UserError(f"{metadata.path}: tokenizer.ggml.* make no tokenizer: {str(error)[:200]!r}") from None
    files[TOKENIZER_CONFIG] = _json({key: value for key, value in about.items() if value is not None})
    return files


def _special(metadata: Metadata, name: str, tokens: list[str]) -> str | None:
    token = metadata.optional(key := f"tokenizer.ggml.{name}_token_id", int)
    if token is not None and not 0 <= token < len(tokens):
        metadata.fail(key, f"is {token}, but there are {len(tokens)} tokens")
    return None if token is None else tokens[token]


def _vocabulary(metadata: Metadata, tokens: list[str]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Ids by token, unused ones aside, and those that are found in a text before anything else."""
    kinds = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL), np.ndarray)
    if len(set(tokens)) < len(tokens):
        metadata.fail("tokenizer.ggml.tokens", "holds a token twice")
    if len(kinds) != len(tokens):
        metadata.fail("tokenizer.ggml.token_type", f"must be {len(tokens)} numbers, one for each token")
    named = [(number, token, kind) for number, (token, kind) in enumerate(zip(tokens, kinds.tolist(), strict=True))]
    added = [
        {"id": number, "content": token, "special": kind != _USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, token, kind in named
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    return {token: number for number, token, kind in named if kind != _UNUSED}, added


def _byte_level_bpe(metadata: Metadata, vocabulary: dict[str, int], cut: _Cut) -> dict[str, Any]:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", None, list)]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            metadata.fail("tokenizer.ggml.merges", f"holds {' '.join(merge)[:60]!r}, which does not join two tokens to a third")
    return {
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(cut),
        "decoder": _byte_level(use_regex=True),
        "model": _bpe(vocabulary, merges, ignore_merges=cut.whole),
    }


def _sentencepiece(metadata: Metadata, vocabulary: dict[str, int]) -> dict[str, Any]:
    """Of two neighbours, those merge first that make the token of the highest score; a letter without a token is its bytes."""
    scores = metadata.get("tokenizer.ggml.scores", None, np.ndarray)
    if len(scores) <= max(vocabulary.values(), default=-1):
        metadata.fail("tokenizer.ggml.scores", "must be one number for each token")
    halves = [
        (-float(scores[number]), vocabulary[token[:i]], vocabulary[token[i:]], token[:i], token[i:])
        for token, number in vocabulary.items()
        for i in range(1, min(len(token), _LONGEST_PIECE))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True, bool)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    first, strip = {"type": "Prepend", "prepend": _SPACE}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    unknown = metadata.optional("tokenizer.ggml.unknown_token_id", int)
    names = {number: token for token, number in vocabulary.items()}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [first, spaces] if prefix else [spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, strip] if prefix else decoders},
        "model": _bpe(vocabulary, [half[3:] for half in sorted(halves)], byte_fallback=True, fuse_unk=True)
        | {"unk_token": names.get(unknown)},
    }


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: bool) -> dict[str, Any]:
    absent = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    usual = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE", **absent, **usual, **options, "vocab": vocabulary, "merges": merges}


def _pre_tokenizer(cut: _Cut) -> dict[str, Any]:
    if cut.split is not None:
        first = {"type": "Split", "pattern": {"Regex": cut.split}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex=False)]}
    if cut.digits:
        return {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
        }
    return _byte_level(use_regex=True)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _begins_with(bos: str | None, number: int | None) -> dict[str, Any]:
    """A post-processor that puts the token before a text, if there is one."""
    if bos is None:
        return _byte_level(use_regex=True)
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    text = {which: {"Sequence": {"id": which, "type_id": number}} for number, which in enumerate("AB")}
    return {
        "type": "TemplateProcessing",
        "single": [*first, text["A"]],
        "pair": [*first, text["A"], {"SpecialToken": {"id": bos, "type_id": 1}}, text["B"]],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------------------------------
# Writing


def tokens_to_gguf(files: Mapping[str, bytes], config: ModelConfig) -> dict[str, Any]:
    """The metadata of tokens, from a folder's tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Without a tokenizer.json, or with one that llama.cpp has no rule for, the model has no tokens there: it takes ids only, and a
    warning says so. The ids that begin, end and pad a text are the configuration's.

    Raises:
        UserError: a file is damaged, or has more tokens than the model, or a text ends with more tokens than GGUF has keys for.
    """
    raw = _object(files, TOKENIZER)
    model, name = raw.get("model", {}), _cut_name(raw)
    if name is None:
        reason = "there is no tokenizer.json" if TOKENIZER not in files else "llama.cpp has no such tokenizer"
        warnings.warn(f"the GGUF is written without a tokenizer and takes token ids only: {reason}", stacklevel=3)
        return {"tokenizer.ggml.model": "none", **_write_special_ids(config, {})}
    added = {token["content"]: token for token in raw.get("added_tokens", [])}
    vocabulary = {**model["vocab"], **{content: token["id"] for content, token in added.items()}}
    by_id = {number: token for token, number in vocabulary.items()}
    if len(by_id) < len(vocabulary) or max(by_id) >= config.vocab_size:
        raise UserError(
            f"{TOKENIZER} has {len(vocabulary)} tokens with ids to {max(by_id)}, which do not fit {config.vocab_size} embeddings"
        )
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]

    def kind(token):
        if token in added:
            return _CONTROL if added[token]["special"] else _USER_DEFINED
        return _NORMAL if token in vocabulary else _UNUSED

    about = _object(files, TOKENIZER_CONFIG)
    template = files[TEMPLATE].decode() if TEMPLATE in files else about.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    unknown = about.get("unk_token")
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kind(token) for token in tokens],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.add_bos_token": _adds_bos(raw.get("post_processor")),
        **_write_special_ids(config, by_id),
    }
    if isinstance(unknown, str) and unknown in vocabulary:
        metadata["tokenizer.ggml.unknown_token_id"] = vocabulary[unknown]
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise UserError(f"{name} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold a JSON object, got {type(content).__name__}")
    return content


def _cut_name(raw: dict[str, Any]) -> str | None:
    """llama.cpp's name for the rule of a tokenizer.json; None when it has none."""
    model, before = raw.get("model", {}), raw.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    if model.get("type") != "BPE" or model.get("byte_fallback") or raw.get("normalizer"):
        return None
    for name, cut in _CUTS.items():
        wanted = _pre_tokenizer(cut)
        wanted = wanted["pretokenizers"] if wanted["type"] == "Sequence" else [wanted]
        whole_fits = cut.whole == bool(model.get("ignore_merges")) or cut is _GPT4O  # its merges make every token anyway
        if [_rule(step) for step in steps] == [_rule(step) for step in wanted] and whole_fits:
            return name
    return None


def _rule(step: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "trim_offsets"}  # offsets are not ids


def _adds_bos(processor: dict[str, Any] | None) -> bool:
    steps = (processor or {}).get("processors", [processor or {}])
    return any("SpecialToken" in step["single"][0] for step in steps if step.get("type") == "TemplateProcessing")


def _write_special_ids(config: ModelConfig, by_id: dict[int, str]) -> dict[str, int]:
    first, *others = config.eos_token_ids or (None,)
    eom = [token for token in others if "eom" in by_id.get(token, "")]
    eot = [token for token in others if token not in eom]
    if len(eom) > 1 or len(eot) > 1:
        raise UserError(
            f"ModelConfig.eos_token_ids={config.eos_token_ids} cannot be written as GGUF, which has a place for the end of a "
            "text, of a turn and of a message"
        )
    ids = {"bos": config.bos_token_id, "eos": first, "eot": (eot or [None])[0], "eom": (eom or [None])[0]}
    ids["padding"] = config.pad_token_id
    return {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items() if token is not None}
