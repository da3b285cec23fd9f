//! Benchmarks: tables for people, one JSON form for programs.
