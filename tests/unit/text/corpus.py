"""Texts that break tokenizers: fixed cases and a seeded Unicode fuzz, with no lone surrogates."""

from __future__ import annotations

import random

CASES = (
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "don't we'll I'M they'RE it's 'quoted' ''",
    "1 12 123 1234 12345 123456789 1,000.50 3.14e-10 0x1F",
    "\u0661\u0662\u0663 \uff11\uff12 \u2167 \u00bd x\u00b2",
    "naïve café Ünïcødé ĳ ǅ ß",
    "e\u0301 a\u030a\u0323 \u0e01\u0e33 \u0915\u094d\u0937\u093f \u202eabc\u202c",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 "
    "\ud55c\uad6d\uc5b4",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 ☃️ \U0001d518\U0001d52b\U0001d526 𓂀",
    "zero\u200bwidth\u200djoin\ufeffbom\u2060 nb\u00a0sp\u202fthin\u3000wide",
    "tab\there\r\nwindows\rmac\x0bvt\x0cff\x85nel\u2028ls\u2029ps",
    "\x00\x01\x02\x07\x1b[31mred\x7f\x9f",
    "a  b   c    d" + " " * 5 + "e" + " " * 17 + "f" + " " * 40 + "g",
    "\n\n\n\nx\n \n  \n\t\t\t\ty" + "\n" * 40 + "z \n\n w\n\n ",
    "def f(x):\n    return {\"a\": [x ** 2, x//3], 'b': None}  # ok\n\n\tif x!=y && z:\n",
    '<html><body class="a">&nbsp;</body></html><!-- --> <table><tr><td>1</td></tr></table>',
    "https://example.org/a?b=c&d=%20#frag user@example.org $100 €5 50% #tag @me ~/x",
    "<s>[INST] hi [/INST] ok</s> <bos>x<eos> <|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<start_of_turn>user\nhi<end_of_turn>\n <|im_start|> <|im_end|>mid<|im_end|><0x0A>",
    "\u2581already\u2581marked \u2581\u2581",
    "ABCdef GHIjkl camelCaseWord SCREAMING_SNAKE kebab-case İstanbul ΑΒΓ αβγ Привет",
    "Łódź שלום مرحبا हिन्दी ไทย ქართული Ελλάδα",
    "\ufffd\ufffe\U0010ffff\U000e0001",
    "a" * 300,
    "ab" * 200 + "!?" * 50,
)
_RANGES = (
    (0x20, 0x7E, 30),
    (0x00, 0x1F, 2),
    (0x30, 0x39, 8),
    (0xA0, 0x24F, 6),
    (0x300, 0x36F, 3),
    (0x370, 0x5FF, 4),
    (0x600, 0xDFF, 4),
    (0x1E00, 0x206F, 4),
    (0x2100, 0x2BFF, 3),
    (0x3000, 0x30FF, 4),
    (0x4E00, 0x9FFF, 6),
    (0xAC00, 0xD7A3, 3),
    (0xFE00, 0xFFEF, 2),
    (0x10000, 0x1F000, 2),
    (0x1F300, 0x1FAFF, 5),
    (0xE0000, 0xE007F, 1),
)
_SNIPPETS = (" ", "  ", "    ", "\n", "\n\n", "\t", " the", "ing", "123", "'s", "don't", "->", "==")


def fuzz(seed: int, count: int, specials: tuple[str, ...] = ()) -> list[str]:
    """`count` random texts: characters of many scripts, common snippets, now and then a special."""
    rng = random.Random(seed)
    spans = [(low, high) for low, high, _ in _RANGES]
    weights = [weight for *_, weight in _RANGES]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 40)):
            draw = rng.random()
            if draw < 0.25:
                parts.append(rng.choice(_SNIPPETS))
            elif draw < 0.28 and specials:
                parts.append(rng.choice(specials))
            elif draw < 0.32:
                parts.append(rng.choice(" \n\u2581") * rng.randint(2, 40))
            else:
                low, high = rng.choices(spans, weights)[0]
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))))
        texts.append("".join(parts))
    return texts
