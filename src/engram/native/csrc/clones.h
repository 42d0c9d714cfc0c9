// Functions marked ENGRAM_CLONES are compiled once per instruction set, where the compiler can do that; the loader picks one.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define ENGRAM_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define ENGRAM_CLONES
#endif
