// Calls functions of the CPU library by request, so that a library for another processor runs in an emulator.
// Reads calls from standard input and writes their results to standard output; emulation.py is the other side.
// Each buffer of a call ends where its memory ends: an access behind it is a segmentation fault.

#include "../../../kernels/cpu/abi.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr size_t PAGE = 1 << 16;

// A number as it is, or a pointer: the index of a buffer, -1 for null, and an offset.
struct Argument {
    union {
        int64_t whole;
        double real;
    };
    int64_t offset;
};

struct Buffer {
    uint64_t size;
    size_t pages;
    char *mapping, *data;

    explicit Buffer(uint64_t bytes) : size(bytes), pages((bytes + PAGE - 1) / PAGE * PAGE) {
        void* mapped = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) abort();
        mapping = static_cast<char*>(mapped);
        if (pages && mprotect(mapping + PAGE, pages, PROT_READ | PROT_WRITE) != 0) abort();
        data = mapping + PAGE + pages - size;
    }
    void release() { munmap(mapping, pages + 2 * PAGE); }
};

std::vector<Buffer> buffers;

void read_all(void* to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) exit(0);
}

void write_all(const void* from, size_t bytes) {
    if (fwrite(from, 1, bytes, stdout) != bytes) abort();
}

template <typename T>
T take(const Argument& given) {
    if constexpr (std::is_pointer_v<T>) {
        if (given.whole < 0) return nullptr;
        return reinterpret_cast<T>(buffers[size_t(given.whole)].data + given.offset);
    } else if constexpr (std::is_floating_point_v<T>) {
        return T(given.real);
    } else {
        return T(given.whole);
    }
}

void answer(int64_t result) { write_all(&result, sizeof result); }

void answer(const char* text) {
    const int64_t length = int64_t(strlen(text));
    write_all(&length, sizeof length);
    write_all(text, size_t(length));
}

template <typename Result, typename... Parameters, size_t... INDEX>
void call(Result (*function)(Parameters...), const Argument* given, std::index_sequence<INDEX...>) {
    const Result result = function(take<Parameters>(given[INDEX])...);
    if constexpr (std::is_pointer_v<Result>) answer(result);
    else answer(int64_t(result));
}

template <typename Result, typename... Parameters>
void call(Result (*function)(Parameters...), const Argument* given) {
    call(function, given, std::index_sequence_for<Parameters...>{});
}

// A line ACE_CALL(name) for each function of the header, in its order.
#define ACE_CALL(name) [](const Argument* given) { call(name, given); },
void (*const functions[])(const Argument*) = {
#include "functions.inc"
};

}  // namespace

int main() {
    while (true) {
        int64_t head[3];  // the function's index, and the numbers of buffers and of arguments
        read_all(head, sizeof head);
        for (int64_t k = 0; k < head[1]; ++k) {
            uint64_t size;
            read_all(&size, sizeof size);
            buffers.emplace_back(size);
            read_all(buffers.back().data, size);
        }
        std::vector<Argument> arguments(size_t(head[2]) + 1);
        read_all(arguments.data(), size_t(head[2]) * sizeof(Argument));
        functions[head[0]](arguments.data());
        for (Buffer& buffer : buffers) {
            write_all(buffer.data, buffer.size);
            buffer.release();
        }
        buffers.clear();
        fflush(stdout);
    }
}
