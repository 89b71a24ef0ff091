//! Faults (being written).
