#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod doctor;
pub mod keys;
pub mod members;

/// The programs in the project's README, compiled so that they stay true.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct ProjectReadme;
