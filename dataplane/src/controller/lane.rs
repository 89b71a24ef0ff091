//! Which two workers of two processes are to have a *lane*: shared memory over which they exchange messages without either controller. Decides; has
//! no clock and looks at no message.
//!
//! With each other process it counts the *turns* of a conversation: the same worker receives from that process and then sends to it, and nobody
//! else does either in between. After so many in a row the conversation is hot, and a lane saves two hops each way. A lane that is closed
//! again before it carried much was not worth its opening: the next one takes twice as many turns.

use std::collections::BTreeMap;

use super::WorkerId;
use super::peers::PeerNumber;

/// Turns in a row after which a conversation is hot.
const HOT_TURNS: u32 = 8;
/// The same after many lanes that were not worth it.
const HOT_TURNS_MAX: u32 = 1 << 13;
/// Turns after which a conversation that the other end finds hot is so for us, too: both count the same, and one may be a turn behind.
const WARM_TURNS: u32 = HOT_TURNS / 2;
/// Messages that make a lane worth its opening.
const WORTH_MESSAGES: u64 = 64;

/// The messages with one other process.
#[derive(Debug)]
struct Talk {
    worker: WorkerId,
    /// It has received since it sent.
    owes: bool,
    turns: u32,
    hot_turns: u32,
}

/// The messages with all others.
#[derive(Debug, Default)]
pub(crate) struct Talks {
    talks: BTreeMap<PeerNumber, Talk>,
}

impl Talks {
    fn talk(&mut self, worker: WorkerId, peer: PeerNumber) -> &mut Talk {
        let new = Talk { worker, owes: false, turns: 0, hot_turns: HOT_TURNS };
        let talk = self.talks.entry(peer).or_insert(new);
        if talk.worker != worker {
            (talk.worker, talk.owes, talk.turns) = (worker, false, 0);
        }
        talk
    }

    /// A worker asks for a message of this process. `None`: of any.
    pub(crate) fn receives(&mut self, worker: WorkerId, from: Option<PeerNumber>) {
        match from {
            Some(peer) => self.talk(worker, peer).owes = true,
            None => self.talks.values_mut().for_each(|talk| (talk.owes, talk.turns) = (false, 0)),
        }
    }

    /// A worker sends a message to this process.
    pub(crate) fn sends(&mut self, worker: WorkerId, to: PeerNumber) {
        let talk = self.talk(worker, to);
        talk.turns = if std::mem::take(&mut talk.owes) { talk.turns.saturating_add(1) } else { 0 };
    }

    /// Whether this conversation is to have a lane.
    pub(crate) fn is_hot(&self, worker: WorkerId, peer: PeerNumber) -> bool {
        self.talks.get(&peer).is_some_and(|talk| talk.worker == worker && talk.turns >= talk.hot_turns)
    }

    /// Whose conversation with this process may have a lane, now that the other end finds it hot.
    pub(crate) fn warm(&self, peer: PeerNumber) -> Option<WorkerId> {
        let talk = self.talks.get(&peer)?;
        (talk.turns >= talk.hot_turns.min(WARM_TURNS)).then_some(talk.worker)
    }

    /// A lane with this process is closed, or came to nothing, after so many messages.
    pub(crate) fn closed(&mut self, peer: PeerNumber, messages: u64) {
        if let Some(talk) = self.talks.get_mut(&peer) {
            (talk.owes, talk.turns) = (false, 0);
            let doubled = talk.hot_turns.saturating_mul(2).min(HOT_TURNS_MAX);
            talk.hot_turns = if messages >= WORTH_MESSAGES { HOT_TURNS } else { doubled };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(talks: &mut Talks, worker: WorkerId, peer: PeerNumber, count: u32) {
        for _ in 0..count {
            talks.receives(worker, Some(peer));
            talks.sends(worker, peer);
        }
    }

    #[test]
    fn a_conversation_is_hot_after_so_many_turns_of_one_worker() {
        let mut talks = Talks::default();
        turns(&mut talks, 1, 0, HOT_TURNS - 1);
        assert!(!talks.is_hot(1, 0));
        turns(&mut talks, 1, 0, 1);
        assert!(talks.is_hot(1, 0) && !talks.is_hot(2, 0) && !talks.is_hot(1, 1));
        assert_eq!((talks.warm(0), talks.warm(1)), (Some(1), None));
    }

    #[test]
    fn others_who_send_or_receive_in_between_end_it() {
        type Meddle = fn(&mut Talks);
        let meddling: [Meddle; 5] = [
            |talks| talks.receives(2, Some(0)),
            |talks| talks.sends(2, 0),
            |talks| talks.receives(1, None),
            |talks| talks.receives(2, None),
            |talks| talks.sends(1, 0),
        ];
        for meddle in meddling {
            let mut talks = Talks::default();
            turns(&mut talks, 1, 0, HOT_TURNS);
            meddle(&mut talks);
            assert!(!talks.is_hot(1, 0) && !talks.is_hot(2, 0));
            turns(&mut talks, 1, 0, HOT_TURNS + 1);
            assert!(talks.is_hot(1, 0));
        }
        let mut talks = Talks::default();
        turns(&mut talks, 1, 0, HOT_TURNS);
        talks.receives(2, Some(1));
        talks.sends(2, 1);
        assert!(talks.is_hot(1, 0), "another process is another conversation");
    }

    #[test]
    fn lanes_that_carry_little_are_opened_ever_more_rarely() {
        let mut talks = Talks::default();
        let mut needed = HOT_TURNS;
        for _ in 0..20 {
            turns(&mut talks, 1, 0, needed - 1);
            assert!(!talks.is_hot(1, 0), "{needed}");
            turns(&mut talks, 1, 0, 1);
            assert!(talks.is_hot(1, 0), "{needed}");
            talks.closed(0, WORTH_MESSAGES - 1);
            needed = (needed * 2).min(HOT_TURNS_MAX);
        }
        talks.closed(0, WORTH_MESSAGES);
        turns(&mut talks, 1, 0, HOT_TURNS);
        assert!(talks.is_hot(1, 0));
    }
}
