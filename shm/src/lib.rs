#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

pub mod descriptor;
pub mod inline;
pub mod participant;

#[cfg_attr(loom, allow(dead_code, reason = "models look at the heap"))]
mod mapping;
mod pair;
#[cfg_attr(loom, allow(dead_code, reason = "models cover the words with edges"))]
mod peer_line;
#[cfg_attr(loom, allow(dead_code, reason = "models look at single pins"))]
pub mod pins;
mod prefetch;
mod sync;
mod width;

pub mod doorbell;
pub mod exchange;
pub mod index;
#[cfg_attr(loom, allow(dead_code, reason = "models look at the heap"))]
pub mod lane;
pub mod ring;
pub mod watch;

#[cfg(all(test, loom))]
mod models;

// Under loom the atomics have another layout: what maps memory is left out, what reasons about it stays.
#[cfg(not(loom))]
pub mod arena;
#[cfg(not(loom))]
pub mod child;
#[cfg(not(loom))]
mod connection_line;
#[cfg(not(loom))]
pub mod handover;
#[cfg(not(loom))]
mod ledger;
#[cfg(not(loom))]
pub mod link;
#[cfg(not(loom))]
pub mod segment;
#[cfg(not(loom))]
mod size_class;

#[cfg(not(loom))]
pub use arena::{Arena, ArenaStats, BadRelease, Block, NoSpace};
#[cfg(not(loom))]
pub use connection_line::LentConnection;
pub use descriptor::{BadDescriptor, BlockRef, Body, Descriptor};
pub use doorbell::{Bell, Doorbell, eventfd, has_barriers, join_barriers};
pub use exchange::{ExchangeCallee, ExchangeCaller, ExchangeReply};
#[cfg(not(loom))]
pub use index::{
    Current, Found, IndexConfig, IndexFile, IndexFull, IndexReader, IndexWriter, KEY_BYTES_MAX, Listed, PinsInUse,
    Place,
};
pub use inline::{INLINE_BYTES_MAX, Inline};
pub use lane::{LaneArbiter, LaneReceiver, LaneSender, Polled, Unsent};
#[cfg(not(loom))]
pub use lane::{LaneError, LaneFile, OwnLane, PeerLane};
#[cfg(not(loom))]
pub use link::{Link, LinkError};
pub use participant::{PARTICIPANTS_MAX, ParticipantId};
pub use peer_line::Take;
pub use pins::{PINS_MAX, PinId, Pins};
pub use ring::{BadPosition, Consumer, Full, Producer};
#[cfg(not(loom))]
pub use segment::{
    AttachError, BadBlock, BlockView, Identity, LAYOUT_VERSION, OwnSegment, PeerSegment, SegmentConfig, SegmentError,
    SegmentFile,
};
pub use watch::Watch;
