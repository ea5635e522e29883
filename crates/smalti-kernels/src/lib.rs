//! Own operations as Burn backend extensions.
//!
//! The only crate with `unsafe` or with the name of a backend in it. Each operation has a portable body made of tensor
//! operations, which serves every backend, and where it pays a specialised one.
