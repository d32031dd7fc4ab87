//! Bodies of the fuzz targets for the devices' registers.
//!
//! Each takes bytes, plays them as accesses, and must return: no panic, no hang, no
//! unbounded growth. The fuzzers call them, and so does a short run in the tests.
