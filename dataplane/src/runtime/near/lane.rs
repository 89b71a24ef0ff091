//! What two processes say to each other about lanes (`runtime::lanes`): records among the frames, so that nothing overtakes; the files of a lane by the
//! socket, before the record that speaks of them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use praas_shm::{Descriptor, LaneFile, SegmentFile};

use super::{NOT_A_WORD, Nears, Stands, Word, say};
use crate::controller::peers::LinkNumber;
use crate::wire::LaneSegment;

const ASK: u8 = 40;
const JOIN: u8 = 41;
const GO: u8 = 42;
const OVER: u8 = 43;
/// Records that may wait for room when one more about a lane is said: there are a few, unless the other end asks and does not read.
const WAITING_MAX: usize = 1024;
/// Files of lanes that came and that no record has spoken of yet.
const HANDS_MAX: usize = 4;

/// About the lane of a number, which its leader gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::runtime) enum LaneWord {
    /// Leader → follower: let us have one. Comes with files.
    Ask,
    /// Follower → leader: yes. Comes with files.
    Join,
    /// My worker sends over it from here on, and all that this process sent before has its verdict.
    Go,
    /// It is closed at my end, or there will be none. `dead`: and so is my worker, who reads nothing any more.
    Over { dead: bool },
}

/// One end of a lane, for the other.
#[derive(Debug)]
pub(in crate::runtime) struct Hand {
    /// The worker's file.
    pub(in crate::runtime) worker: LaneFile,
    /// Its controller's.
    pub(in crate::runtime) controller: LaneFile,
    /// The worker's memory.
    pub(in crate::runtime) memory: SegmentFile,
    pub(in crate::runtime) segment: LaneSegment,
}

/// What came about a lane.
#[derive(Debug)]
pub(in crate::runtime) struct LaneNews {
    pub(in crate::runtime) word: LaneWord,
    pub(in crate::runtime) number: u64,
    /// With `Ask` and `Join`.
    pub(in crate::runtime) hand: Option<Hand>,
}

pub(super) fn to_record(word: LaneWord, number: u64) -> Descriptor {
    let (kind, tag) = match word {
        LaneWord::Ask => (ASK, 0),
        LaneWord::Join => (JOIN, 0),
        LaneWord::Go => (GO, 0),
        LaneWord::Over { dead } => (OVER, u16::from(dead)),
    };
    Descriptor::bare(kind, tag, number, 0)
}

/// `None`: the record is about something else.
pub(super) fn read(record: &Descriptor) -> Option<LaneWord> {
    match record.kind() {
        ASK => Some(LaneWord::Ask),
        JOIN => Some(LaneWord::Join),
        GO => Some(LaneWord::Go),
        OVER => Some(LaneWord::Over { dead: record.tag() != 0 }),
        _ => None,
    }
}

impl Nears {
    /// Says something about a lane, after all that was said before. False: it cannot be said, as no memory is shared or the files cannot be handed over.
    pub(in crate::runtime) fn say_lane(
        &mut self,
        link: LinkNumber,
        word: LaneWord,
        number: u64,
        hand: Option<&Hand>,
    ) -> bool {
        let Some(stands) = self.stands_mut(link).filter(|stands| stands.backlog.len() < WAITING_MAX) else {
            return false;
        };
        if let Some(hand) = hand {
            let word = Word::Lane { number, segment: hand.segment.clone() };
            let files: [BorrowedFd<'_>; 3] = [hand.worker.fd(), hand.controller.fd(), hand.memory.fd()];
            if say(stands.socket.as_fd(), &word, &files).is_err() {
                return false;
            }
        }
        stands.put(to_record(word, number));
        true
    }
}

impl Stands {
    pub(super) fn take_hand(&mut self, number: u64, segment: LaneSegment, fds: Vec<OwnedFd>) -> Result<(), String> {
        let [worker, controller, memory] = <[OwnedFd; 3]>::try_from(fds).map_err(|_| NOT_A_WORD)?;
        if self.hands.len() >= HANDS_MAX {
            return Err("it hands over files of lanes that it does not speak of".into());
        }
        let (worker, controller) = (LaneFile::from_fd(worker), LaneFile::from_fd(controller));
        self.hands.push((number, Hand { worker, controller, memory: SegmentFile::from_fd(memory), segment }));
        Ok(())
    }

    /// A record about a lane, with its files.
    pub(super) fn take_lane(&mut self, word: LaneWord, number: u64) -> Result<LaneNews, String> {
        let hand = match word {
            LaneWord::Ask | LaneWord::Join => {
                // They were said on the socket before the record was written.
                self.read_socket()?;
                let at = self.hands.iter().position(|(handed, _)| *handed == number);
                Some(self.hands.swap_remove(at.ok_or("it speaks of a lane without its files")?).1)
            }
            LaneWord::Go | LaneWord::Over { .. } => None,
        };
        Ok(LaneNews { word, number, hand })
    }
}
