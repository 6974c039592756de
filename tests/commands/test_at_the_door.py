"""Wrong values on the command line: refused in a line or two, before a model is loaded."""

import json

import pytest

PRUNE = ("prune", "TINY", "OUT", "--calibration", "TEXT")
RECOVER = ("recover", "PRUNED", "OUT", "--calibration", "TEXT", "--length", "16")
EVALUATE = ("evaluate", "TINY", "--text", "TEXT", "--length", "16")
GENERATE = ("generate", "TINY", "--prompt", "a")
STUDY = (
    "study",
    "TINY",
    "OUT",
    "--calibration",
    "TEXT",
    "--evaluation",
    "TEXT",
    "--lengths",
    "9",
    "--window-length",
    "9",
)
BENCH = ("bench", "--rows", "1")


@pytest.fixture
def at_the_door(command, monkeypatch, tiny_checkpoint, some_text, tmp_path):
    """at_the_door(*words): the code and errors of a command that must not come to loading a model."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ace_triton.inputs.checkpoint.load", load)
    monkeypatch.setattr("ace_triton.packed.checkpoint.load", load)
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    (pruned / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    (pruned / "ace_triton.json").write_text(json.dumps({"source": "tiny", "source_path": "../tiny"}))
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "ace_triton_packed.json").write_text("{}")
    names = {"TINY": tiny_checkpoint, "PRUNED": pruned, "PACKED": packed, "TEXT": some_text, "OUT": tmp_path / "out"}

    def run(*words):
        code, _, errors = command(*[names.get(word, word) for word in words])
        assert "Traceback" not in errors
        assert not (tmp_path / "out").exists()
        return code, errors

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PRUNE, "--samples", "0"), "'--samples': it must be 1 or more; got 0"),
        ((*PRUNE, "--length", "1"), "'--length': it must be 2 or more; got 1"),
        ((*PRUNE, "--batch-size", "0"), "'--batch-size': it must be 1 or more; got 0"),
        ((*PRUNE, "--seed", str(2**63)), "'--seed': it must be 0 or more and 9223372036854775807 or less"),
        ((*PRUNE, "--seed", "x"), "'--seed'"),
        ((*RECOVER, "--minutes", "nan"), "'--minutes': it must be above 0; got nan"),
        ((*RECOVER, "--minutes", "inf"), "'--minutes': it must be above 0; got inf"),
        ((*RECOVER, "--steps", "0"), "'--steps': it must be 1 or more"),
        ((*RECOVER, "--samples", "0"), "'--samples': it must be 1 or more"),
        ((*RECOVER, "--learning-rate", "nan"), "'--learning-rate': it must be above 0; got nan"),
        ((*RECOVER, "--hidden-states", "-1"), "'--hidden-states': it must be 0 or more; got -1"),
        ((*RECOVER, "--tokens-per-step", "0"), "'--tokens-per-step': it must be 1 or more"),
        ((*RECOVER, "--seed", str(2**64)), "'--seed'"),
        ((*EVALUATE, "--windows", "0"), "'--windows': it must be 1 or more; got 0"),
        ((*EVALUATE, "--length", "1"), "'--length': it must be 2 or more; got 1"),
        ((*GENERATE, "--max-new-tokens", "0"), "'--max-new-tokens': it must be 1 or more; got 0"),
        ((*GENERATE, "--temperature", "nan"), "'--temperature': it must be 0 or more; got nan"),
        ((*GENERATE, "--seed", str(2**64)), "'--seed'"),
        ((*STUDY, "--samples", "0"), "'--samples': it must be 1 or more; got 0"),
        ((*STUDY, "--windows", "0"), "'--windows': it must be 1 or more; got 0"),
        ((*STUDY, "--seeds", "0"), "'--seeds': it must be 1 or more; got 0"),
    ],
)
def test_a_number_out_of_range_is_a_wrong_call(at_the_door, words, message):
    code, errors = at_the_door(*words)
    assert code == 2
    assert message in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PRUNE, "--length", "100000"), "--length 100000 is more than the model's 128 positions"),
        ((*PRUNE, "--permute", "--sparsity", "0.5"), "permute orders channels into the groups of n:m"),
        ((*PRUNE, "--rotate", "--method", "magnitude"), "rotate learns from calibration tokens, and magnitude alone"),
        ((*PRUNE, "--rotate", "--sequential", "none"), "rotate runs each block once more before it is pruned"),
        ((*PRUNE, "--preset", "great"), "--preset 'great': use one of fast, balanced, best"),
        ((*PRUNE, "--update", "obs"), "--update 'obs': use one of rescale, lstsq or none"),
        ((*PRUNE, "-u", "damping=nan"), "--update: damping must be a number, 0 or more; got nan"),
        ((*PRUNE, "--method", "ria", "-o", "a=nan"), "method 'ria': a must be a number; got nan"),
        ((*PRUNE, "--method", "ria", "-o", "a="), "method 'ria': a must be a number; got ''"),
        ((*PRUNE, "--method", "ace", "-o", "eps=x"), "eps must be a number, above 0 and below 1; got 'x'"),
        ((*PRUNE, "--method", "ace", "-o", "sign=1.0"), "sign must be one of 1, -1; got '1.0'"),
        ((*PRUNE, "--method", "dass", "-o", "alpha=x"), "alpha must be a number; got 'x'"),
        ((*PRUNE, "--method", "sparsegpt", "-o", "block_size=x"), "block_size must be a whole number, 1 or more"),
        ((*PRUNE, "--method", "sparsegpt", "-o", "block_size=6"), "block_size must be a positive multiple of 4"),
        ((*PRUNE, "--method", "dass", "--permute", "--sequential", "layers"), "leave one of them out"),
        ((*PRUNE, "--calibration", "none.jsonl"), "none.jsonl: no such file"),
        ((*PRUNE, "--calibration", "pydoc:all"), "use pydoc:calibration or pydoc:evaluation"),
        ((*PRUNE, "--device", "warp"), "device 'warp' is not available here"),
        ((*PRUNE, "--device", "meta"), "device 'meta' holds no data"),
        ((*PRUNE, "--dtype", "int3"), "--dtype 'int3': use one of auto"),
        ((*PRUNE, "--packed", "--sparsity", "0.3"), "a packed checkpoint needs n:m"),
        ((*PRUNE, "--packed", "--sparsity", "31:32"), "31:32 packed is no smaller than dense"),
        ((*PRUNE, "--packed", "--sparsity", "30:32", "--dtype", "bfloat16"), "30:32 packed is no smaller than dense"),
        ((*PRUNE, "--packed", "--method", "dass", "--bits", "4"), "method 'dass' groups weights along the outputs"),
        ((*PRUNE, "--packed", "--method", "dass", "--sparsity", "3:4"), "3:4 prunes 0.25: use another method"),
        ((*PRUNE, "--plugin", "none.py"), "--plugin none.py: cannot be imported"),
        (("prune", "PACKED", "OUT"), "changed: name the dense checkpoint that it was made from"),
        (("prune", "TEXT", "OUT"), "is a file; name a folder or a .gguf file"),
        (("prune", "./no/such/folder", "OUT"), "./no/such/folder: cannot be loaded: no such file or folder"),
        (("prune", "no.gguf", "OUT"), "no.gguf: cannot be loaded: no such file or folder"),
        (("pack", "pruned_50x", "OUT"), "pruned_50x: cannot be loaded: no such file or folder"),
        (("pack", "PRUNED", "OUT", "--sparsity", "0.5"), "packed layers need a pattern n:m"),
        ((*RECOVER, "--length", "1000"), "--length 1000 is more than the model's 128 positions"),
        ((*RECOVER, "--calibration", "none.txt"), "none.txt: no such file"),
        ((*RECOVER, "--teacher", "./none"), "./none: cannot be loaded: no such file or folder"),
        ((*EVALUATE, "--length", "256"), "--length 256 is more than the model's 128 positions"),
        ((*EVALUATE, "--text", "none.txt"), "none.txt: no such file"),
        ((*EVALUATE, "--device", "a:b:c"), "device 'a:b:c' is not available here"),
        ((*GENERATE, "--max-new-tokens", "500"), "--max-new-tokens 500 is more than the model's 128 positions"),
        ((*STUDY, "--window-lengths", ","), "--window-lengths ',': write whole numbers of 2 or more"),
        ((*STUDY, "--lengths", "1"), "--lengths '1': write whole numbers of 2 or more"),
        ((*STUDY, "--lengths", "256"), "--lengths 256 is more than the model's 128 positions"),
        ((*STUDY, "--methods", "ria:a=x"), "method 'ria': a must be a number; got 'x'"),
        ((*STUDY, "--quality", "--minutes", "nan"), "--minutes 'nan': write numbers above 0"),
        ((*STUDY, "--evaluation", "none.txt"), "none.txt: no such file"),
        (("study", "TINY", "PRUNED", *STUDY[3:]), "is a model's folder: name another one"),
        ((*BENCH, "--shape", "0x0"), "--shape '0x0': write OUTxIN, each from 1 to 999,999,999, as"),
        ((*BENCH, "--shape", "99999999999999999999x4"), "write OUTxIN, each from 1 to 999,999,999, as 4096x4096"),
        (("bench", "--shape", "8x8", "--rows", "99999999999999999999"), "numbers from 1 to 999,999,999 with commas"),
        ((*BENCH, "--shape", "a:b:c"), "--shape 'a:b:c': write OUTxIN"),
        ((*BENCH, "--shape", "4x66"), "the 66 inputs are not a multiple of 4"),
        (("demo", "--out", "OUT", "--sparsity", "0.5"), "the demo packs the pruned model, so give a pattern n:m"),
        (("demo", "--out", "OUT", "--text", "none.txt"), "none.txt: no such file"),
        (("demo", "--out", "OUT", "--calibration", "self"), "--calibration self: the demo calibrates on text"),
    ],
)
def test_a_mistake_is_one_line(at_the_door, words, message):
    code, errors = at_the_door(*words)
    assert code == 1
    assert message in errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert errors.count("error: ") == 1


@pytest.mark.parametrize(
    "words",
    [
        (*RECOVER, "--bits", "5"),
        (*RECOVER, "--group", "64"),
        (*RECOVER, "--bits", "8", "--group", "48"),
        (*RECOVER, "--bits", "8", "--tune", "groups"),
        (*RECOVER, "--steps", "1", "--minutes", "1"),
        (*RECOVER, "--rank", "4"),
        (*RECOVER, "--norms", "--tune", "groups"),
        (*RECOVER, "--dtype", "float16"),
        (*RECOVER, "--device", "warp"),
        (*RECOVER, "--json", "no/such/folder/a.json"),
        (*RECOVER, "--teacher", "./none"),
        (*RECOVER, "--calibration", "none.txt"),
        ("recover", "PACKED", "OUT"),
        ("recover", "./none", "OUT"),
        (*EVALUATE, "--text", "none.txt"),
        ("shrink", "TINY", "OUT", "--evaluation", "none.txt"),
        (*STUDY, "--evaluation", "none.txt"),
    ],
)
def test_what_needs_no_model_is_refused_before_its_configuration_is_read(at_the_door, monkeypatch, words):
    """transformers, which reads a configuration, takes seconds to import."""

    def read(*_, **__):
        raise AssertionError("a configuration was read")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", read)
    code, errors = at_the_door(*words)
    assert code == 1
    assert errors.splitlines()[-1].startswith("error: ")


def test_a_report_without_a_place_asks_for_the_teacher(at_the_door, tmp_path):
    (tmp_path / "pruned" / "ace_triton.json").write_text(json.dumps({"source": "llama", "source_path": None}))
    code, errors = at_the_door(*RECOVER)
    assert code == 1
    assert "only its name is known, llama: name it with --teacher" in errors
    (tmp_path / "pruned" / "ace_triton.json").write_text(json.dumps({"source": 3}))
    code, errors = at_the_door(*RECOVER)
    assert code == 1
    assert "--teacher" in errors


def test_a_gguf_file_tells_its_context_in_its_header(tmp_path):
    import struct

    from ace_triton.commands.sources import context_length

    def text(word):
        return struct.pack("<Q", len(word)) + word

    entries = [
        text(b"general.name") + struct.pack("<I", 8) + text(b"tiny"),
        text(b"general.tags") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b"),
        text(b"general.weight") + struct.pack("<If", 6, 0.5),
        text(b"llama.context_length") + struct.pack("<II", 4, 4096),
    ]
    (tmp_path / "a.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)) + b"".join(entries))
    assert context_length(tmp_path / "a.gguf") == 4096
    (tmp_path / "b.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 9) + entries[0])
    assert context_length(tmp_path / "b.gguf") is None
    assert context_length(tmp_path / "none.gguf") is None


def test_the_longest_sequence_of_any_family(make_decoder, tmp_path):
    from ace_triton.commands.sources import context_length

    for family, positions in {"llama": 2048, "gpt2": 64}.items():
        make_decoder(family).config.save_pretrained(tmp_path / family)
        assert context_length(tmp_path / family) == positions
    assert context_length("nobody/nothing") is None
