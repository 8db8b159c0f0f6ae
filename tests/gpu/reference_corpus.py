"""Collects what the reference models are trained on, and writes the texts that go with them.

    python reference_corpus.py --prose FOLDER --out CORPUS

CORPUS gets a byte-level BPE tokenizer, streams of token ids (train.npy, {valid,test}_{code,prose}.npy), and the texts
calibration.txt (from the sources of valid) and evaluation.txt (from those of test).

Code: the standard library and the packages of the Python that runs this, without exact duplicates, vendored copies and
tables, and a few MB of each package at most. Prose: public-domain books, speeches and commentaries. Whole modules and
packages are held out, and whole documents of prose; the texts are excerpts of these.
"""

import argparse
import hashlib
import re
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOT = "<|endoftext|>"
VOCABULARY = 4096

CAP = 3_500_000  # characters of one package
SKIPPED = {"encodings", "idna", "pydoc_data", "wcwidth"}  # tables
# Held out: modules of the standard library, which the texts are made of, and two packages for each split.
# fmt: off
CALIBRATION = [
    "calendar", "configparser", "contextlib", "mailbox", "pdb", "plistlib", "random", "smtplib", "statistics",
    "tempfile", "uuid",
]
EVALUATION = [
    "bdb", "cmd", "csv", "difflib", "fileinput", "fractions", "ftplib", "gettext", "heapq", "imaplib", "modulefinder",
    "pprint", "selectors", "webbrowser", "zipfile",
]
# fmt: on
HELD_OUT = dict.fromkeys([*CALIBRATION, "jinja2", "traitlets"], "valid")
HELD_OUT |= dict.fromkeys([*EVALUATION, "anyio", "jsonschema"], "test")
# Prose of the texts: how a held-out document begins, and how many excerpts are taken of it.
CALIBRATION_PROSE = {
    "NORTHANGER ABBEY": 6,
    "To the Senate and House of Representatives: In submitting my eighth": 2,  # Grant, 1876
    "CHAPTER 105.": 2,  # Moby-Dick
    "TITLE.\n\nTo the Chief Musician, to Jeduthun.": 2,  # The Treasury of David, Psalm 77
    "To the Senate and House of Representatives: The Nation continues": 2,  # Roosevelt, 1904
    "CHAPTER 76.": 1,
    "Psalm 65 OVERVIEW": 2,
    "Mr. President, Mr. Speaker, Members of the Congress: I am happy to report to this 81st": 2,  # Truman, 1949
    "CHAPTER 103.": 1,
    "Mr. Vice President, Mr. Speaker, Members of the 88th Congress": 1,  # Kennedy, 1963
    "CHAPTER 7.": 1,
}
EVALUATION_PROSE = {
    "Persuasion": 7,
    "Fellow-Citizens of the Senate and House of Representatives: I regret": 2,  # Van Buren, 1839
    "CHAPTER 110.": 2,
    "TITLE.\n\nA Song of Degrees. It would be hard": 2,  # Psalm 130
    "To the Congress of the United States: The assemblage": 2,  # Cleveland, 1894
    "CHAPTER 115.": 1,
    "Psalm 139 OVERVIEW": 2,
    "The Senate and House of Representatives of the United States: At a moment": 2,  # Jefferson, 1805
    "Fellow Citizens of the Senate and of the House of Representatives: In performing": 2,  # Jackson, 1834
}
CODE_EXCERPT, PROSE_EXCERPT = 4200, 2600  # characters at least
CODE_CUT = re.compile(r"(?<=\n\n)(?=(?: {4})?(?:@|class |def |async def ))")
PROSE_CUT = re.compile(r"(?<=[a-z]{3}[.?!][ \n])(?=[A-Z])")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_written_by_hand(source: str) -> bool:
    """Whether a file is neither tiny nor huge, nor mostly data: few digits, no endless lines, not too repetitive."""
    if not 500 < len(source) < 300_000 or max(map(len, source.split("\n"))) >= 1000:
        return False
    data = source.encode()
    return sum(map(source.count, "0123456789")) < 0.12 * len(source) and len(data) < 7 * len(zlib.compress(data))


def read_code() -> dict[str, list[str]]:
    """Python files of each split in a random order that depends on their names alone."""
    packages: dict[str, dict[str, tuple[str, str]]] = {}  # package -> digest of the text -> (digest of the name, text)
    about_held_out = re.compile(rf"test_({'|'.join(HELD_OUT)})")
    for root in (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            package, name = parts[0].removesuffix(".py"), "/".join(parts)
            if package in SKIPPED or {"site-packages", "_vendor"} & set(parts) or about_held_out.search(name):
                continue
            source = path.read_text(encoding="utf-8", errors="replace")
            if "\ufffd" not in source and is_written_by_hand(source):
                packages.setdefault(package, {}).setdefault(digest(source), (digest(name), source))
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    for package, files in packages.items():
        room = CAP
        for key, source in sorted(files.values()):
            room -= len(source)
            if room > 0:
                splits[HELD_OUT.get(package, "train")].append((key, source))
    return {split: [source for _, source in sorted(files)] for split, files in splits.items()}


def read_prose(folder: Path, split: str) -> list[str]:
    return (folder / f"pd_text_{split}.txt").read_text(encoding="utf-8").split(f"\n{EOT}\n")


def train_tokenizer(texts: list[str], folder: Path) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOT,
        eos_token=EOT,
        pad_token=EOT,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return bpe


def excerpts(documents: dict[str, str], counts: dict[str, int], size: int, cut: re.Pattern[str]) -> list[str]:
    """Contiguous pieces from the midst of documents, spread over each: the first of every document, the second, ..."""
    pieces = []
    for i in range(max(counts.values())):
        for name in (name for name, count in counts.items() if count > i):
            text = documents[name]
            cuts = [match.start() for match in cut.finditer(text)]
            start = next(position for position in cuts if position >= len(text) * (i + 0.3) / counts[name])
            pieces.append(text[start : next((end for end in cuts if end >= start + size), cuts[-1])].rstrip())
    return pieces


def write_texts(prose: dict[str, list[str]], folder: Path) -> None:
    """calibration.txt and evaluation.txt: an excerpt of code, one of prose, and so on."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name, modules, openings, documents in (
        ("calibration", CALIBRATION, CALIBRATION_PROSE, prose["valid"]),
        ("evaluation", EVALUATION, EVALUATION_PROSE, prose["test"]),
    ):
        sources = {module: (library / f"{module}.py").read_text(encoding="utf-8") for module in modules}
        number = sum(openings.values())
        longest = sorted(modules, key=lambda module: -len(sources[module]))[: number - len(modules)]
        code = excerpts(sources, {module: 1 + (module in longest) for module in modules}, CODE_EXCERPT, CODE_CUT)
        books = {opening: next(text for text in documents if text.startswith(opening)) for opening in openings}
        pairs = zip(code, excerpts(books, openings, PROSE_EXCERPT, PROSE_CUT), strict=True)
        text = "\n\n\n".join(piece for pair in pairs for piece in pair) + "\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def write_corpus(prose_folder: Path, folder: Path) -> None:
    """Writes the tokenizer, train.npy, {valid,test}_{code,prose}.npy (streams of token ids) and the two texts."""
    code, prose = read_code(), {split: read_prose(prose_folder, split) for split in ("train", "valid", "test")}
    write_texts(prose, folder)
    mixed = sorted(code["train"] + prose["train"], key=digest)
    bpe = train_tokenizer(mixed, folder)
    streams = {"train": mixed}
    for split in ("valid", "test"):
        streams |= {f"{split}_code": code[split], f"{split}_prose": prose[split]}
    for name, texts in streams.items():
        ids: list[np.ndarray] = []
        for start in range(0, len(texts), 256):
            for encoding in bpe.encode_batch_fast(texts[start : start + 256]):
                ids.append(np.array([*encoding.ids, bpe.token_to_id(EOT)], dtype=np.uint16))
        np.save(folder / f"{name}.npy", np.concatenate(ids))
        print(f"{name}: {len(texts):,} documents, {sum(map(len, texts)):,} characters, {sum(map(len, ids)):,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect and tokenize the corpus of the reference models.")
    parser.add_argument("--prose", type=Path, required=True, help="folder of pd_text_{train,valid,test}.txt")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_corpus(args.prose, args.out)


if __name__ == "__main__":
    main()
