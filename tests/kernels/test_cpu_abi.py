"""The C header of the CPU library: how its signatures are read, and that it declares all that is defined and called."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from ace_triton.kernels.cpu_abi import HEADER, signatures, structures

FOLDER = Path(__file__).parents[2] / "kernels"


def test_signatures_of_a_header():
    header = """
        /* ACE_EXPORT int ace_gone(int32_t n); */
        #define ACE_EXPORT __attribute__((visibility("default")))
        ACE_EXPORT const char* ace_name(void);
        int ace_hidden(int32_t n);
        ACE_EXPORT int ace_use(const char* name);
        ACE_EXPORT int ace_all(void* data, const float* row, uint8_t* bits, int64_t n,
                               int32_t m, float power, double inverse);
    """.replace("\n        ", "\n")
    pointer = ctypes.c_void_p
    assert signatures(header) == {
        "ace_name": (ctypes.c_char_p, []),
        "ace_use": (ctypes.c_int, [ctypes.c_char_p]),
        "ace_all": (
            ctypes.c_int,
            [pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_double],
        ),
    }


def test_structures_of_a_header():
    header = """
        /* struct AceGone { */
        struct AceWeight {
            int32_t kind;
            const void* values; /* [rows] */
            float eps;
        };
    """.replace("\n        ", "\n")
    (made,) = structures(header).values()
    assert made.__name__ == "AceWeight"
    assert made._fields_ == [("kind", ctypes.c_int32), ("values", ctypes.c_void_p), ("eps", ctypes.c_float)]


def test_the_header_declares_every_function_that_the_sources_define():
    defined = re.compile(r"^(?:int|int32_t|const char\*) (ace_\w+)\(", re.MULTILINE)
    sources = "\n".join(path.read_text() for path in (FOLDER / "cpu").glob("*.cpp"))
    assert sorted(signatures(HEADER.read_text())) == sorted(defined.findall(sources))


def test_the_header_declares_every_function_that_python_calls():
    called = {name for path in FOLDER.glob("*.py") for name in re.findall(r"\bace_[a-z_]+\b", path.read_text())}
    assert "ace_select_nm" in called
    assert called - {"ace_triton"} <= signatures(HEADER.read_text()).keys()
