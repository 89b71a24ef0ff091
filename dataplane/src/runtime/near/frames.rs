//! Frames as records of a ring. What crosses is what crosses by TCP: number, kind, key, payload and the rest of the header.
//!
//! | record   | tag          | id       | aux                                             | body                                             |
//! |----------|--------------|----------|-------------------------------------------------|--------------------------------------------------|
//! | head     | `function`   | `call`   | `flags`, from bit 16 bytes of the key, from bit 32 `status` | the key; in the sender's near arena if it is long |
//! | rest     | segment      | `aux`    | `budget_ns`                                     | the payload; a block lies in the segment of that number |
//! | alone    | as a head    | as a head | as a head                                      | payload, then key; `aux` and `budget_ns` are zero |
//! | forget   | segment      |          |                                                 |                                                  |
//!
//! The kind of a head is the frame's, of one that stands alone with [`ALONE`].

use praas_shm::{BlockRef, Body, Descriptor, INLINE_BYTES_MAX, Inline};
use praas_transport::Header;

use crate::wire::frame;

/// Bit of a head's kind: nothing follows.
const ALONE: u8 = 0x80;
/// What follows a head.
const REST: u8 = 32;
/// No block of that segment comes any more.
const FORGET: u8 = 33;
/// The near segment of who speaks: long keys, and payloads that lie in no other segment.
pub(super) const STAGE: u16 = 0;

/// What a record says.
#[derive(Debug, PartialEq)]
pub(super) enum Record {
    /// A whole frame.
    Alone {
        header: Header,
        key: Vec<u8>,
        payload: Inline,
    },
    /// The first half of one.
    Head {
        header: Header,
        key: Body,
    },
    /// The second.
    Rest {
        aux: u64,
        budget_ns: u64,
        segment: u16,
        payload: Body,
    },
    Forget {
        segment: u16,
    },
}

/// The bytes of a frame's key, where they are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Key<'a> {
    /// No longer than a record holds.
    Short(&'a [u8]),
    Staged(BlockRef),
}

/// A frame in one record or two.
pub(super) fn records(header: &Header, key: Key<'_>, segment: u16, payload: Body) -> (Descriptor, Option<Descriptor>) {
    let key_bytes = match key {
        Key::Short(key) => key.len() as u64,
        Key::Staged(block) => block.len,
    };
    let aux = u64::from(header.flags) | key_bytes << 16 | u64::from(header.status.cast_unsigned()) << 32;
    if let (Key::Short(key), Body::Inline(payload), 0, 0) = (key, payload, header.aux, header.budget_ns)
        && let Some(both) = joined(payload.as_slice(), key)
    {
        return (Descriptor::new(header.kind | ALONE, header.function, header.call, aux, both), None);
    }
    let key = match key {
        Key::Short(key) => Body::Inline(Inline::new(key).expect("a short key fits a record")),
        Key::Staged(block) => Body::Block(block),
    };
    let head = Descriptor::new(header.kind, header.function, header.call, aux, key);
    (head, Some(Descriptor::new(REST, segment, header.aux, header.budget_ns, payload)))
}

/// No block of this segment comes after this record.
pub(super) fn forget(segment: u16) -> Descriptor {
    Descriptor::bare(FORGET, segment, 0, 0)
}

fn joined(payload: &[u8], key: &[u8]) -> Option<Inline> {
    let mut both = [0; INLINE_BYTES_MAX];
    let bytes = payload.len() + key.len();
    let both = both.get_mut(..bytes)?;
    both[..payload.len()].copy_from_slice(payload);
    both[payload.len()..].copy_from_slice(key);
    Inline::new(both)
}

/// Reads what a peer wrote.
///
/// # Errors
/// It is no record of ours; which rule it breaks.
pub(super) fn read(record: &Descriptor) -> Result<Record, &'static str> {
    let (kind, aux) = (record.kind() & !ALONE, record.aux());
    match record.kind() {
        REST => {
            return Ok(Record::Rest {
                aux: record.id(),
                budget_ns: aux,
                segment: record.tag(),
                payload: record.body(),
            });
        }
        FORGET => return Ok(Record::Forget { segment: record.tag() }),
        _ if !matches!(kind, frame::MESSAGE..=frame::VERDICT) => return Err("a record of a kind that there is not"),
        _ => {}
    }
    let [flags_low, flags_high, key_low, key_high, status @ ..] = aux.to_le_bytes();
    let key_bytes = u16::from_le_bytes([key_low, key_high]);
    let header = Header {
        kind,
        flags: u16::from_le_bytes([flags_low, flags_high]),
        function: record.tag(),
        status: i32::from_le_bytes(status),
        call: record.id(),
        key_bytes: key_bytes.into(),
        ..Header::default()
    };
    match record.body() {
        Body::Inline(both) if record.kind() & ALONE != 0 => {
            let bytes = both.as_slice();
            let payload = bytes.len().checked_sub(usize::from(key_bytes)).ok_or("a key longer than its record")?;
            let (payload, key) = bytes.split_at(payload);
            let payload = Inline::new(payload).expect("shorter than what it is part of");
            Ok(Record::Alone { header, key: key.to_vec(), payload })
        }
        Body::Inline(key) if key.as_slice().len() == usize::from(key_bytes) => {
            Ok(Record::Head { header, key: key.into() })
        }
        Body::Block(key)
            if record.kind() & ALONE == 0
                && key.len == u64::from(key_bytes)
                && usize::from(key_bytes) <= praas_shm::KEY_BYTES_MAX =>
        {
            Ok(Record::Head { header, key: key.into() })
        }
        _ => Err("a key of another length than was said"),
    }
}

#[cfg(test)]
mod tests {
    use praas_shm::ParticipantId;

    use super::*;

    fn block(len: u64) -> BlockRef {
        BlockRef { offset: 128, len, index: 3, generation: 7, owner: ParticipantId::new(5).unwrap() }
    }

    fn header() -> Header {
        Header { kind: frame::ANSWER, flags: 0x8005, function: 9, status: -3, call: 1 << 40, ..Header::default() }
    }

    #[test]
    fn a_frame_is_read_as_it_was_written_in_one_record_or_two() {
        let keys = [&b""[..], b"k", &[b'k'; INLINE_BYTES_MAX]];
        let short = [0, 1, 39, 40].map(|len| Body::from(Inline::new(&[7; 40][..len]).unwrap()));
        let payloads = short.into_iter().chain([block(100).into()]);
        let rests = [(0, 0), (u64::MAX, 0), (0, 5)];
        let all =
            payloads.flat_map(|payload| keys.map(|key| rests.map(|(aux, budget_ns)| (key, payload, aux, budget_ns))));
        for (key, payload, aux, budget_ns) in all.flatten() {
            let sent = Header { aux, budget_ns, ..header() };
            let (head, rest) = records(&sent, Key::Short(key), 4, payload);
            let expected = Header { key_bytes: u32::try_from(key.len()).unwrap(), ..header() };
            match (read(&head).unwrap(), rest.map(|rest| read(&rest).unwrap())) {
                (Record::Alone { header, key: found, payload: inline }, None) => {
                    assert_eq!((header, &*found, Body::from(inline)), (expected, key, payload));
                    assert_eq!((aux, budget_ns), (0, 0));
                }
                (Record::Head { header, key: found }, Some(rest)) => {
                    assert_eq!((header, found), (expected, Inline::new(key).unwrap().into()));
                    assert_eq!(rest, Record::Rest { aux, budget_ns, segment: 4, payload });
                }
                other => panic!("{other:?}"),
            }
        }
        let (head, _) = records(&header(), Key::Staged(block(1024)), STAGE, block(1).into());
        assert!(matches!(read(&head), Ok(Record::Head { key: Body::Block(key), .. }) if key == block(1024)));
        assert_eq!(read(&forget(8)), Ok(Record::Forget { segment: 8 }));
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let words = |kind: u8, aux: u64, body: Body| read(&Descriptor::new(kind, 0, 1, aux, body)).map(drop);
        let short: Body = Inline::new(b"key").unwrap().into();
        for kind in [0, 1, 9, 15, 31, 34, 127, ALONE, ALONE | REST, ALONE | FORGET, 255] {
            assert!(words(kind, 3 << 16, short).is_err(), "{kind}");
        }
        for key_bytes in [0, 2, 4, 65_535_u64] {
            assert!(words(frame::MESSAGE, key_bytes << 16, short).is_err(), "{key_bytes}");
            let alone = words(frame::MESSAGE | ALONE, key_bytes << 16, short);
            assert_eq!(alone.is_ok(), key_bytes <= 3, "{key_bytes}");
        }
        for (said, len, fits) in [(41, 41, true), (41, 42, false), (1024, 1024, true), (1025, 1025, false)] {
            assert_eq!(words(frame::CALL, said << 16, block(len).into()).is_ok(), fits, "{said} {len}");
        }
        assert!(words(frame::CALL | ALONE, 41 << 16, block(41).into()).is_err());
    }
}
