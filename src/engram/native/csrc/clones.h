// ENGRAM_CLONES in front of a function: compiled once per instruction set, chosen when the library is loaded, where the compiler can do that.
#pragma once

#define ENGRAM_CLONES
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#undef ENGRAM_CLONES
#define ENGRAM_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#endif
