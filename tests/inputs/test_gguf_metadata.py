"""The quick reader of GGUF metadata: the values of the package's own reader, for every type of array."""

import gguf
import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from transformers import modeling_gguf_pytorch_utils as loading

from ace_triton.inputs.gguf_metadata import fast_gguf_metadata, metadata_reader

ARRAYS = {
    "strings": ["a", "", "\u00e9\u00e8 token", "x" * 300],
    "integers": [1, -2, 2**31 - 1],
    "floats": [0.5, -1.25],
    "booleans": [True, False],
}


@pytest.fixture(params=[GGUFEndian.LITTLE, GGUFEndian.BIG], ids=["little", "big"])
def file(request, tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama", endianess=request.param)
    for name, values in ARRAYS.items():
        writer.add_array(f"test.{name}", values)
    writer.add_string("test.last", "the end")
    writer.add_tensor("weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def test_fields_and_tensors_are_those_of_the_package(file):
    ours, theirs = metadata_reader()(file), GGUFReader(file)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].types == field.types
        assert ours.fields[name].contents() == field.contents()
    assert {name: ours.fields[f"test.{name}"].contents() for name in ARRAYS} == ARRAYS
    assert [(tensor.name, tensor.data_offset) for tensor in ours.tensors] == [
        (tensor.name, tensor.data_offset) for tensor in theirs.tensors
    ]
    assert np.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


@pytest.mark.parametrize("name", ["strings", "integers"])
def test_a_file_that_ends_within_an_array_is_refused(file, name):
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(f"test.{name}".encode()) + len(f"test.{name}") + 20])
    with pytest.raises(ValueError, match="the file ends within its metadata"):
        metadata_reader()(file)


def test_contexts_that_overlap_leave_the_package_as_it_was():
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    first, second = fast_gguf_metadata(), fast_gguf_metadata()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gguf.GGUFReader is metadata_reader()
    second.__exit__(None, None, None)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own


def test_the_metadata_are_read_once_for_configuration_and_tokenizer(monkeypatch):
    read = []

    def load(path, return_tensors=False, **_options):
        read.append((path, return_tensors))
        return {"config": {"a": 1}}

    own = loading.load_gguf_checkpoint
    monkeypatch.setattr(loading, "load_gguf_checkpoint", load)
    with fast_gguf_metadata():
        first = loading.load_gguf_checkpoint("a.gguf")
        first["config"]["a"] = 2
        assert loading.load_gguf_checkpoint("a.gguf", return_tensors=False) == {"config": {"a": 1}}
        assert loading.load_gguf_checkpoint("a.gguf", return_tensors=True, torch_dtype=None) == {"config": {"a": 1}}
    assert read == [("a.gguf", False), ("a.gguf", True)]
    monkeypatch.undo()
    assert loading.load_gguf_checkpoint is own
