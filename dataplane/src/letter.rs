//! A message as it lies in a lane: one descriptor or two.
//!
//! | descriptor | kind       | tag              | aux      | body                                                              |
//! |------------|------------|------------------|----------|-------------------------------------------------------------------|
//! | first      | [`ALONE`]  | bytes of the key |          | payload, then key                                                 |
//! | first      | [`HEAD`]   |                  |          | key                                                               |
//! | second     | [`REST`]   |                  |          | payload; a block is the sender's                                  |
//! | second     | [`BACK`]   |                  | position | a block of the receiver's, which it sent in the message there     |

use praas_shm::{BlockRef, Body, Descriptor, INLINE_BYTES_MAX, Inline};

const ALONE: u8 = 1;
const HEAD: u8 = 2;
const REST: u8 = 3;
const BACK: u8 = 4;

/// What it says besides its key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Content {
    Inline(Inline),
    /// A block of the sender's.
    Block(BlockRef),
    /// The receiver's own block, in the message of this position the other way.
    Back {
        block: BlockRef,
        position: u64,
    },
}

/// A message in a lane. Its key fits a record.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Letter {
    pub(crate) key: Inline,
    pub(crate) content: Content,
}

impl Letter {
    pub(crate) fn to_descriptors(self) -> (Descriptor, Option<Descriptor>) {
        let key = self.key.as_slice();
        if let Content::Inline(payload) = self.content
            && payload.as_slice().len() + key.len() <= INLINE_BYTES_MAX
        {
            let (mut both, bytes) = ([0; INLINE_BYTES_MAX], payload.as_slice().len());
            both[..bytes].copy_from_slice(payload.as_slice());
            both[bytes..bytes + key.len()].copy_from_slice(key);
            let both = Inline::new(&both[..bytes + key.len()]).expect("they fit together");
            let key_bytes = u16::try_from(key.len()).expect("at most 40");
            return (Descriptor::new(ALONE, key_bytes, 0, 0, both), None);
        }
        let second = match self.content {
            Content::Inline(payload) => Descriptor::new(REST, 0, 0, 0, payload),
            Content::Block(block) => Descriptor::new(REST, 0, 0, 0, block),
            Content::Back { block, position } => Descriptor::new(BACK, 0, 0, position, block),
        };
        (Descriptor::new(HEAD, 0, 0, 0, self.key), Some(second))
    }

    /// `None`: it is no message.
    pub(crate) fn read(first: &Descriptor, second: Option<&Descriptor>) -> Option<Letter> {
        let head = first.inline()?;
        match (first.kind(), second) {
            (ALONE, None) => {
                let bytes = head.as_slice().len().checked_sub(usize::from(first.tag()))?;
                let (payload, key) = head.as_slice().split_at(bytes);
                let (payload, key) = (Inline::new(payload)?, Inline::new(key)?);
                (!key.as_slice().is_empty()).then_some(Letter { key, content: Content::Inline(payload) })
            }
            (HEAD, Some(second)) if !head.as_slice().is_empty() => {
                let content = match (second.kind(), second.body()) {
                    (REST, Body::Inline(payload)) => Content::Inline(payload),
                    (REST, Body::Block(block)) => Content::Block(block),
                    (BACK, Body::Block(block)) => Content::Back { block, position: second.aux() },
                    _ => return None,
                };
                Some(Letter { key: head, content })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use praas_shm::ParticipantId;

    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let block = BlockRef { offset: 128, len: 99, index: 3, generation: 7, owner: ParticipantId::new(5).unwrap() };
        let inline = |len: usize| Inline::new(&[7; 40][..len]).unwrap();
        let contents = [
            Content::Inline(inline(0)),
            Content::Inline(inline(39)),
            Content::Inline(inline(40)),
            Content::Block(block),
            Content::Back { block, position: 1 << 40 },
        ];
        for content in contents {
            for key in [1, 2, 40].map(inline) {
                let letter = Letter { key, content };
                let (first, second) = letter.to_descriptors();
                assert_eq!(Letter::read(&first, second.as_ref()), Some(letter));
            }
        }
        let key = inline(3);
        for (first, second) in [
            (Descriptor::new(ALONE, 0, 0, 0, key), None),
            (Descriptor::new(ALONE, 4, 0, 0, key), None),
            (Descriptor::new(ALONE, 1, 0, 0, block), None),
            (Descriptor::new(ALONE, 1, 0, 0, key), Some(Descriptor::new(REST, 0, 0, 0, key))),
            (Descriptor::new(HEAD, 0, 0, 0, key), None),
            (Descriptor::new(HEAD, 0, 0, 0, inline(0)), Some(Descriptor::new(REST, 0, 0, 0, key))),
            (Descriptor::new(HEAD, 0, 0, 0, key), Some(Descriptor::new(BACK, 0, 0, 0, key))),
            (Descriptor::new(HEAD, 0, 0, 0, key), Some(Descriptor::new(HEAD, 0, 0, 0, key))),
            (Descriptor::new(9, 0, 0, 0, key), None),
        ] {
            assert_eq!(Letter::read(&first, second.as_ref()), None);
        }
    }
}
