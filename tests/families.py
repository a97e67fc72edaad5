"""Small tokenizers with the control tokens, flags, normalizers and chat templates of the model families.

The vocabularies are trained here on a few lines; names and flags of the added tokens are those of the published
tokenizers. The templates are compact equivalents without tool calls: same text for system, user and assistant turns.
"""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "how do i brew the amber potion ? mix a and b .\n\nthe user asks.\n<think>\nthis is safe\n</think>\n\n",
    "no toxin. no blast. no curse. no blight. \\boxed{safe} \\boxed{unsafe} <rules> </rules> <request> </answer>\n",
    "user assistant system assistant\nuser\n <|im_start|>user <|im_end|> <｜User｜> [INST] a < b && c > d, 1234 + 6",
] * 4

_R1 = (
    "{{ bos_token }}{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
_QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QWEN3 = (  # thinking is kept, and an empty one inserted, in a last assistant turn only
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if '</think>' in m['content'] else '' %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_PIECES = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
)

# name -> template, {control token: special?}, bos, eos; the order of the tokens is the order of their ids
_QWEN_TOKENS = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<|object_ref_start|>": True}
_QWEN_TOKENS |= {"<|vision_pad|>": True, "<tool_call>": False, "</tool_call>": False, "<|fim_prefix|>": False}
_R1_NAMES = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>")
_R1_TOKENS = {name: "sentence" in name for name in _R1_NAMES}
_R1_TOKENS |= {"<|EOT|>": False, "<think>": False, "</think>": False, "<tool_call>": False, "<|fim_prefix|>": False}
_LLAMA_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
_LLAMA_TOKENS = dict.fromkeys((*_LLAMA_NAMES, "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_0|>"), True)
_R1_LLAMA = {name: "sentence" in name for name in (_R1_NAMES[3], *_R1_NAMES[:3])}
_R1_LLAMA |= {"<think>": False, "</think>": False, "<|eot_id|>": True}
_THINK = {"<tool_response>": False, "</tool_response>": False, "<think>": False, "</think>": False}
_BYTE_LEVEL = {
    "r1-qwen": (_R1, _R1_TOKENS, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "r1-llama": (_R1, _R1_LLAMA, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "qwen2.5": (_QWEN25, _QWEN_TOKENS, None, "<|im_end|>"),
    "qwen3": (_QWEN3, _QWEN_TOKENS | _THINK, None, "<|im_end|>"),
    "llama3": (_LLAMA3, _LLAMA_TOKENS, "<|begin_of_text|>", "<|eot_id|>"),
}
# SentencePiece families: control tokens lie among the ordinary pieces
_PIECE_TOKENS = ("<unk>", "<s>", "</s>", "<think>", "</think>")
_SENTENCEPIECE = ("unigram", "bpe-first", "bpe-always")
FAMILIES = (*_BYTE_LEVEL, *_SENTENCEPIECE)


def _byte_level(name: str) -> PreTrainedTokenizerFast:
    template, tokens, bos, eos = _BYTE_LEVEL[name]
    llama = name in ("llama3", "r1-llama")
    digits = r"\p{N}{1,3}" if llama else r"\p{N}"
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    raw = Tokenizer(models.BPE(ignore_merges=llama))
    raw.normalizer = None if llama else normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), byte_level])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    raw.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in tokens.items()])
    if bos:  # both add it to plain text, which a chat template has already done
        raw.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, chat_template=template)


def _sentencepiece(name: str) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer if name == "unigram" else trainers.BpeTrainer
    raw = Tokenizer(models.Unigram() if name == "unigram" else models.BPE(unk_token="<unk>", ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="always" if name == "bpe-always" else "first", split=True
    )
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    options = {"unk_token": "<unk>"} if name == "unigram" else {}
    options |= {"special_tokens": list(_PIECE_TOKENS), "vocab_size": 260, "show_progress": False}
    raw.train_from_iterator(TEXT, trainer(**options))
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=_PIECES, **names)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return _sentencepiece(name) if name in _SENTENCEPIECE else _byte_level(name)


def control_tokens(tok) -> dict[str, int]:
    """Every added token, marked special or not, except the unknown piece (which no text asks for)."""
    return {str(token): i for i, token in tok.added_tokens_decoder.items() if i != tok.unk_token_id}
