//! Attacks with the answers to calls that run together.

use praas_dataplane::Batch;

use super::*;

const WAIT: Duration = Duration::from_millis(20);

/// What an honest worker says of the functions below.
pub(crate) fn triggers() -> Value {
    serde_json::json!([[FUNCTIONS.len() - 1, { "Batch": { "calls": 3, "wait_ns": WAIT.as_nanos() as u64 } }]])
}

/// The functions that honest workers have besides.
pub(crate) fn honest(worker: Worker) -> Worker {
    worker.batch("together", Batch { calls: 3, wait: WAIT }, |_, inputs| {
        Ok(inputs.into_iter().map(|input| Ok(input.into())).collect())
    })
}

impl Evil {
    /// Takes the calls of a batch, and answers as the first of them says.
    pub(crate) fn attack_batch(&mut self, head: &Descriptor) {
        let count =
            head.inline().map_or(0, |count| u16::from_le_bytes(count.as_slice().try_into().expect("two bytes")));
        let calls: Vec<Descriptor> = (0..count).map(|_| self.poll()).collect();
        if let Wire::Ring { link, .. } = &self.wire {
            link.mark_taken(link.consumer.head());
        }
        let name =
            calls[0].inline().map_or(String::new(), |name| String::from_utf8_lossy(name.as_slice()).into_owned());
        let mut answer = |call: u64| self.reply(call, Body::Inline(Inline::new(b"done").expect("short")));
        let ids: Vec<u64> = calls.iter().map(Descriptor::id).collect();
        match name.as_str() {
            "one too many" => ids.iter().chain([&ids[0]]).for_each(|call| answer(*call)),
            "one that is none" => {
                ids.iter().for_each(|call| answer(*call));
                answer(u64::MAX);
            }
            "the second first" => answer(ids[1]),
            "the first twice" => (0..2).for_each(|_| answer(ids[0])),
            "the last only" => answer(ids[2]),
            "a number of nobody" => answer(ids[0] ^ 1 << 40),
            "none, and the next" => self.tell(REQUEST, 999, 1, u64::MAX),
            _ => ids.iter().for_each(|call| answer(*call)),
        }
    }
}
