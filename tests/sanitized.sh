#!/usr/bin/env bash
# Runs a command with the sanitizers' runtime loaded first, as a sanitized library in an ordinary Python needs it.
# Leaks are not looked for: the interpreter and torch keep memory until exit on purpose.
set -euo pipefail
runtime=$("${CXX:-g++}" -print-file-name=libasan.so)
export LD_PRELOAD="$runtime $("${CXX:-g++}" -print-file-name=libubsan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
exec "$@"
