use proptest::prelude::*;

use super::*;

pub(crate) fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let inline = prop::collection::vec(any::<u8>(), 0..=INLINE_BYTES_MAX)
        .prop_map(|bytes| Body::Inline(Inline::new(&bytes).unwrap()));
    let block =
        (0_u8..64, any::<[u32; 2]>(), any::<[u64; 2]>()).prop_map(|(owner, [index, generation], [offset, len])| {
            Body::Block(BlockRef { owner: ParticipantId::new(owner).unwrap(), index, generation, offset, len })
        });
    (any::<u8>(), any::<u16>(), any::<u64>(), any::<u64>(), prop_oneof![inline, block])
        .prop_map(|(kind, tag, id, aux, body)| Descriptor::new(kind, tag, id, aux, body))
}

#[test]
fn golden_bytes_of_an_inline_descriptor() {
    let descriptor = Descriptor::new(
        0x0A,
        0x0C0B,
        0x1817_1615_1413_1211,
        0x2827_2625_2423_2221,
        Body::Inline(Inline::new(b"0123456789").unwrap()),
    );
    let mut golden = [0; 64];
    golden[4..8].copy_from_slice(&[0x0A, 10, 0x0B, 0x0C]);
    golden[8..16].copy_from_slice(&[0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
    golden[16..24].copy_from_slice(&[0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x28]);
    golden[24..34].copy_from_slice(b"0123456789");
    assert_eq!(descriptor.to_bytes(), golden);
    assert_eq!(Descriptor::from_bytes(&golden), Ok(descriptor));
}

#[test]
fn golden_bytes_of_a_block_descriptor() {
    let block = BlockRef {
        owner: ParticipantId::new(63).unwrap(),
        index: 0x0403_0201,
        generation: 0x0807_0605,
        offset: 0x0102_0304_0506_0740,
        len: 0x0A0B,
    };
    let descriptor = Descriptor::new(1, 0, 0, 0, Body::Block(block));
    let mut golden = [0; 64];
    golden[4..6].copy_from_slice(&[1, 0xFF]);
    golden[24..32].copy_from_slice(&[0x40, 7, 6, 5, 4, 3, 2, 1]);
    golden[32..34].copy_from_slice(&[0x0B, 0x0A]);
    golden[40..48].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    golden[48] = 63;
    assert_eq!(descriptor.to_bytes(), golden);
    assert_eq!(Descriptor::from_bytes(&golden), Ok(descriptor));
}

/// R1: every value of every byte that decides something.
#[test]
fn r1_every_boundary_of_every_checked_field_is_decided() {
    for length in 0..=u8::MAX {
        let words = [u64::from(length) << 40, 0, 0, 0, 0, 0, 0, 0];
        let decoded = Descriptor::decode(&words);
        match length {
            0..=40 | 0xFF => assert!(decoded.is_ok(), "{length}"),
            _ => assert_eq!(decoded, Err(BadDescriptor::InlineLength { claimed: length })),
        }
    }
    let boundaries =
        (0..64).flat_map(|bit| [1_u64 << bit, (1 << bit) - 1, !(1 << bit), (1 << bit) + 1]).chain([0, u64::MAX]);
    for value in boundaries {
        let mut words = [u64::from(BODY_IS_A_BLOCK) << 40, 0, 0, value, value, value, 0, 0];
        assert!(Descriptor::decode(&words).is_ok(), "offsets and lengths are for the segment to check");
        words[6] = value;
        assert_eq!(Descriptor::decode(&words).is_ok(), value < 64, "{value:#x}");
        words[6] = 0;
        words[7] = value;
        assert_eq!(Descriptor::decode(&words).is_ok(), value == 0, "{value:#x}");
    }
}

#[test]
fn inline_holds_forty_bytes_and_no_more() {
    assert_eq!(Inline::new(&[7; 40]).unwrap().as_slice(), &[7; 40]);
    assert!(Inline::new(&[7; 41]).is_none());
    assert!(Inline::new(&[7; 256]).is_none());
    assert_eq!(Inline::empty(), Inline::new(b"").unwrap());
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(descriptor in any_descriptor()) {
        prop_assert_eq!(Descriptor::decode(&descriptor.encode()), Ok(descriptor));
        prop_assert_eq!(Descriptor::from_bytes(&descriptor.to_bytes()), Ok(descriptor));
    }

    /// What an earlier message left in the slot must not matter, nor the stamp.
    #[test]
    fn stale_words_and_stamps_mean_nothing(descriptor in any_descriptor(), stale in any::<[u64; 8]>(), stamp in any::<u32>()) {
        let mut words = stale;
        words[0] = descriptor.head_word(stamp);
        words[1] = descriptor.id();
        descriptor.store_rest(|at, word| words[at] = word);
        prop_assert_eq!(Descriptor::decode(&words), Ok(descriptor));
    }

    /// R1: any eight words are refused or become a descriptor that means the same when encoded again.
    #[test]
    fn r1_any_words_are_refused_or_understood(mut words in any::<[u64; 8]>(), length in 0_u64..64, as_block in any::<bool>()) {
        let length = if as_block { 0xFF } else { length };
        words[0] = words[0] & !(0xFF << 40) | length << 40;
        if let Ok(descriptor) = Descriptor::decode(&words) {
            prop_assert_eq!(Descriptor::decode(&descriptor.encode()), Ok(descriptor));
        }
    }

    /// R3: a word that changes after its first read cannot make two reads disagree, because there are no two reads.
    #[test]
    fn r3_no_word_is_fetched_twice(words in any::<[u64; 8]>(), length in prop_oneof![0_u64..64, Just(0xFF)]) {
        let mut fetched = [false; 8];
        let head = words[0] & !(0xFF << 40) | length << 40;
        let _ = Descriptor::decode_with(head, words[1], |at| {
            assert!(at >= 2 && !std::mem::replace(&mut fetched[at], true), "word {at} is fetched again");
            words[at]
        });
    }
}
