//! Functions that read and write the state of their process, and take the times: who reads state is a function.

use std::hint::black_box;
use std::time::Instant;

use praas_dataplane::{Context, Failure, Input, Object, Output};
use serde::{Deserialize, Serialize};

use super::{refuse, samples_out};
use crate::end::{is_stamped, nanoseconds, stamp};

/// Does what a [`StateOrder`] says and answers with the times.
pub(crate) const DRIVE: &str = "state_drive";
/// Writes one object, as an [`Access`] says.
pub(crate) const WRITE: &str = "state_write";
/// Looks at one object, all of it, as an [`Access`] says.
pub(crate) const CHECK: &str = "state_check";
/// Overwrites one object until a stop is there; answers with how often.
pub(crate) const OVERWRITE: &str = "state_overwrite";
/// Adds a vector to the accumulator under a key; answers with its first and last element.
pub(crate) const REDUCE: &str = "state_reduce";
/// Answers with the object of a key, which is gone then.
pub(crate) const TAKE: &str = "state_take";

/// The object that is read and written.
const KEY: &[u8] = b"measured";
/// Ends an [`OVERWRITE`].
const STOP: &[u8] = b"stop";

/// What is timed.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub(crate) enum Timed {
    /// Get an object that another worker wrote, look at both its ends, let go of it.
    Get,
    /// The same while another worker overwrites it at full speed.
    GetContended,
    /// Get it as a list of `f64`, look at its length and both its ends, let go of it.
    GetTyped,
    /// Get one of `objects` under keys of 8 bytes, at random.
    GetRandom,
    /// No state: [`READS`] reads in a row, each where the one before says, of a memory as large as that of `objects` objects.
    ReadRandom,
    /// Put bytes.
    Put,
    /// Put bytes that are written where they stay: only their ends are written anew, as of what is sent to somebody else's store.
    PutInPlace,
    /// Put a list of `f64`.
    PutTyped,
    /// No state: one copy of so many bytes, from memory of this worker to memory of this worker, to two places by turns: a put does not write over the
    /// object that is current, so that what is last in a cache is not where the next copy goes.
    Copy,
    /// Put objects `first` to `objects` under keys of 8 bytes; one time for all.
    Fill,
}

/// One block of samples, as JSON.
#[derive(Copy, Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StateOrder {
    pub(crate) timed: Timed,
    /// Of a value.
    pub(crate) bytes: usize,
    /// Samples taken first and not recorded.
    pub(crate) warm_up: usize,
    pub(crate) samples: usize,
    /// So many in a row make a sample, which is a mean of them: 1, or more where the clock would be a large part of it.
    pub(crate) batch: usize,
    /// Stamp of the first value that is written.
    pub(crate) sequence: u64,
    pub(crate) first: u64,
    pub(crate) objects: u64,
}

/// One object, of its length and with its stamp, as JSON.
#[derive(Copy, Clone, Debug, Serialize, Deserialize)]
struct Access {
    bytes: usize,
    sequence: u64,
    typed: bool,
}

/// Reads and writes, and times them.
pub(super) fn drive(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let order: StateOrder = serde_json::from_slice(input).map_err(refuse)?;
    let samples_ns = match order.timed {
        Timed::Get | Timed::GetTyped => {
            let typed = order.timed == Timed::GetTyped;
            by_another(context, WRITE, Access { bytes: order.bytes, sequence: order.sequence, typed })?;
            if typed { get_typed(context, order)? } else { get(context, order)? }
        }
        Timed::GetContended => get_contended(context, order)?,
        Timed::GetRandom => get_random(context, order)?,
        Timed::ReadRandom => read_random(order)?,
        Timed::Put => put(context, order)?,
        Timed::PutInPlace => put_in_place(context, order)?,
        Timed::PutTyped => put_typed(context, order)?,
        Timed::Copy => copy(order)?,
        Timed::Fill => fill(context, order)?,
    };
    Ok(samples_out(&samples_ns))
}

/// Has another worker do something.
fn by_another(context: &mut Context<'_>, function: &str, access: Access) -> Result<(), Failure> {
    let reply = context.invoke(function, serde_json::to_vec(&access).map_err(refuse)?).map_err(refuse)?;
    if reply.status() == 0 { Ok(()) } else { Err(refuse(String::from_utf8_lossy(&reply))) }
}

/// Runs `once` as often as the order says and takes the time of each batch, divided by its length. One read of the clock a batch.
fn timed(order: StateOrder, mut once: impl FnMut() -> Result<(), Failure>) -> Result<Vec<u64>, Failure> {
    let mut samples_ns = Vec::with_capacity(order.samples);
    let mut before = Instant::now();
    for sample in 0..order.warm_up + order.samples {
        for _ in 0..order.batch {
            once()?;
        }
        let after = Instant::now();
        if sample >= order.warm_up {
            samples_ns.push(nanoseconds(before, after) / order.batch as u64);
        }
        before = after;
    }
    Ok(samples_ns)
}

fn missing() -> Failure {
    refuse("wrong answer: an object that was put is not there")
}

fn get(context: &mut Context<'_>, order: StateOrder) -> Result<Vec<u64>, Failure> {
    let mut state = context.state();
    timed(order, || {
        let object = state.get(KEY)?.ok_or_else(missing)?;
        if object.len() == order.bytes && is_stamped(&object, order.sequence) {
            return Ok(());
        }
        Err(refuse(format!("wrong answer: an object of {} B has {} B or another stamp", order.bytes, object.len())))
    })
}

fn get_typed(context: &mut Context<'_>, order: StateOrder) -> Result<Vec<u64>, Failure> {
    let (elements, stamp) = (order.bytes / 8, number(order.sequence));
    let mut state = context.state();
    timed(order, || {
        let list = state.get_typed::<Vec<f64>>(KEY)?.ok_or_else(missing)?;
        let ends = list.first().zip(list.last());
        if list.len() == elements && ends.is_some_and(|(first, last)| *first == stamp && *last == stamp) {
            return Ok(());
        }
        Err(refuse(format!("wrong answer: a list of {elements} numbers has {} or other ends", list.len())))
    })
}

/// The stamp of a list: small enough to be exact.
#[expect(clippy::cast_precision_loss, reason = "sequence numbers stay below 2^53")]
fn number(sequence: u64) -> f64 {
    sequence as f64
}

fn list(bytes: usize, sequence: u64) -> Vec<f64> {
    let mut list = vec![0.5; bytes / 8];
    stamp_list(&mut list, sequence);
    list
}

fn stamp_list(list: &mut [f64], sequence: u64) {
    let last = list.len() - 1;
    (list[0], list[last]) = (number(sequence), number(sequence));
}

/// Words of a value that is written while others read it: all of them follow from the first, up to 64 B; of a longer one the last does.
fn word(sequence: u64, position: usize) -> u64 {
    (sequence ^ position as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)
}

/// Longest value of which every word is looked at.
const WHOLE_BYTES: usize = 64;

fn seal(value: &mut [u8], sequence: u64) {
    let whole = value.len() <= WHOLE_BYTES;
    let (words, _) = value.as_chunks_mut::<8>();
    let last = words.len() - 1;
    for (position, bytes) in words.iter_mut().enumerate() {
        if position == 0 {
            *bytes = sequence.to_le_bytes();
        } else if whole || position == last {
            *bytes = word(sequence, position).to_le_bytes();
        }
    }
}

/// The sequence number of a sealed value, when it is whole.
fn sealed(value: &[u8]) -> Option<u64> {
    let (words, _) = value.as_chunks::<8>();
    let sequence = u64::from_le_bytes(*words.first()?);
    let fits = |position: usize| u64::from_le_bytes(words[position]) == word(sequence, position);
    let last = words.len() - 1;
    let is_whole = if value.len() <= WHOLE_BYTES { (1..=last).all(fits) } else { fits(last) };
    is_whole.then_some(sequence)
}

/// Reads what another worker overwrites meanwhile, and wants to see that it does.
fn get_contended(context: &mut Context<'_>, order: StateOrder) -> Result<Vec<u64>, Failure> {
    let mut value = vec![0xA5; order.bytes];
    seal(&mut value, order.sequence);
    context.state().put(KEY, &value)?;
    context.state().delete(STOP)?;
    let (bytes, sequence) = (order.bytes, order.sequence);
    let access = serde_json::to_vec(&Access { bytes, sequence, typed: false }).map_err(refuse)?;
    let writer = context.submit(OVERWRITE, access).map_err(refuse)?;
    // Not before it writes.
    let begun = |object: &Object| sealed(object).is_some_and(|seen| seen != sequence);
    let patience = Instant::now();
    while !context.state().get(KEY)?.as_ref().is_some_and(begun) {
        if patience.elapsed().as_secs() > 5 {
            return Err(refuse("the other worker does not write"));
        }
        std::thread::yield_now();
    }
    let (mut last, mut versions) = (0, 0_u64);
    let mut state = context.state();
    let taken = timed(order, || {
        let object = state.get(KEY)?.ok_or_else(missing)?;
        match sealed(&object) {
            Some(seen) if object.len() == bytes && seen >= last => {
                versions += u64::from(seen != last);
                last = seen;
                Ok(())
            }
            seen => Err(refuse(format!(
                "wrong answer: an object of {bytes} B is torn, or older than one before: {seen:?} after {last}"
            ))),
        }
    });
    state.put(STOP, b"stop")?;
    let reply = context.wait(writer).map_err(refuse)?;
    if reply.status() != 0 {
        return Err(refuse(String::from_utf8_lossy(&reply)));
    }
    let taken = taken?;
    if versions < 2 && order.samples >= 1000 {
        return Err(refuse(format!("only {versions} versions were seen: nothing was overwritten")));
    }
    Ok(taken)
}

/// Input: an [`Access`]. Overwrites with ever higher sequence numbers until [`STOP`] is there.
pub(super) fn overwrite(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let access: Access = serde_json::from_slice(input).map_err(refuse)?;
    let mut value = vec![0xA5; access.bytes];
    let mut sequence = access.sequence;
    let mut state = context.state();
    while state.get(STOP)?.is_none() {
        sequence += 1;
        seal(&mut value, sequence);
        state.put(KEY, &value)?;
    }
    Ok(Output::from((sequence - access.sequence).to_le_bytes().to_vec()))
}

/// Overwrites an object; another worker looks at the last one.
fn put(context: &mut Context<'_>, order: StateOrder) -> Result<Vec<u64>, Failure> {
    let mut value = vec![0xA5; order.bytes];
    let mut sequence = order.sequence;
    let mut state = context.state();
    let samples_ns = timed(order, || {
        sequence += 1;
        stamp(&mut value, sequence);
        state.put(KEY, &value)?;
        Ok(())
    })?;
    by_another(context, CHECK, Access { bytes: order.bytes, sequence, typed: false })?;
    Ok(samples_ns)
}

/// Objects written whole first, so that the memory of each draft has the value but for its ends: versions take few places, by turns.
const PLACES: u64 = 16;

/// Overwrites an object with drafts; another worker looks at the last one.
fn put_in_place(context: &mut Context<'_>, order: StateOrder) -> Result<Vec<u64>, Failure> {
    let mut sequence = order.sequence;
    let mut state = context.state();
    for _ in 0..PLACES {
        let mut draft = state.draft(KEY, order.bytes)?;
        draft.fill(0xA5);
        state.publish(draft)?;
    }
    let samples_ns = timed(order, || {
        sequence += 1;
        let mut draft = state.draft(KEY, order.bytes)?;
        stamp(&mut draft, sequence);
        state.publish(draft)?;
        Ok(())
    })?;
    by_another(context, CHECK, Access { bytes: order.bytes, sequence, typed: false })?;
    Ok(samples_ns)
}

fn put_typed(context: &mut Context<'_>, order: StateOrder) -> Result<Vec<u64>, Failure> {
    let mut value = list(order.bytes, order.sequence);
    let mut sequence = order.sequence;
    let mut state = context.state();
    let samples_ns = timed(order, || {
        sequence += 1;
        stamp_list(&mut value, sequence);
        state.put_typed(KEY, &value)?;
        Ok(())
    })?;
    by_another(context, CHECK, Access { bytes: order.bytes, sequence, typed: true })?;
    Ok(samples_ns)
}

fn copy(order: StateOrder) -> Result<Vec<u64>, Failure> {
    let mut from = vec![0xA5; order.bytes];
    let (mut to, mut other) = (vec![0; order.bytes], vec![0; order.bytes]);
    let mut sequence = order.sequence;
    let samples_ns = timed(order, || {
        sequence += 1;
        stamp(&mut from, sequence);
        std::mem::swap(&mut to, &mut other);
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
        Ok(())
    })?;
    if to == from { Ok(samples_ns) } else { Err(refuse("wrong answer: a copy is not what was copied")) }
}

fn fill(context: &mut Context<'_>, order: StateOrder) -> Result<Vec<u64>, Failure> {
    let mut value = vec![0xA5; order.bytes];
    let mut state = context.state();
    let before = Instant::now();
    for number in order.first..order.objects {
        stamp(&mut value, number);
        state.put(number.to_le_bytes(), &value)?;
    }
    Ok(vec![nanoseconds(before, Instant::now())])
}

/// Numbers that differ from order to order (xorshift64, Marsaglia 2003).
fn random(order: StateOrder) -> impl FnMut() -> u64 {
    let mut random = order.sequence | 1;
    move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    }
}

fn get_random(context: &mut Context<'_>, order: StateOrder) -> Result<Vec<u64>, Failure> {
    let mut next = random(order);
    let mut state = context.state();
    timed(order, || {
        let number = next() % order.objects;
        let object = state.get(number.to_le_bytes())?.ok_or_else(missing)?;
        if object.len() == order.bytes && is_stamped(&object, number) {
            return Ok(());
        }
        Err(refuse(format!("wrong answer: object {number} is not what was put")))
    })
}

/// Reads in a row that a get takes of memory that no cache holds: slot, entry, object.
pub(crate) const READS: usize = 3;
/// What an object of 64 B takes, all in all, in cache lines.
const OBJECT_LINES: u64 = 4;

fn read_random(order: StateOrder) -> Result<Vec<u64>, Failure> {
    #[repr(align(64))]
    #[derive(Clone, Copy)]
    struct Line(u64);
    let count = usize::try_from(order.objects * OBJECT_LINES).map_err(refuse)?;
    let mut next = random(order);
    let lines: Vec<Line> = (0..count).map(|_| Line(next())).collect();
    let mut at = 0;
    let samples_ns = timed(order, || {
        // Of what was read last, too: none of them can begin before that is here.
        at ^= next();
        for _ in 0..READS {
            at ^= lines[usize::try_from(at).unwrap_or(0) % count].0;
        }
        Ok(())
    })?;
    black_box(at);
    Ok(samples_ns)
}

/// Input: an [`Access`].
pub(super) fn write(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let Access { bytes, sequence, typed } = serde_json::from_slice(input).map_err(refuse)?;
    if typed {
        context.state().put_typed(KEY, &list(bytes, sequence))?;
    } else {
        let mut value = vec![0xA5; bytes];
        stamp(&mut value, sequence);
        context.state().put(KEY, &value)?;
    }
    Ok(Output::empty())
}

/// Input: an [`Access`].
pub(super) fn check(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let Access { bytes, sequence, typed } = serde_json::from_slice(input).map_err(refuse)?;
    let is_right = if typed {
        let found = context.state().get_typed::<Vec<f64>>(KEY)?.ok_or_else(missing)?;
        let expected = list(bytes, sequence);
        found.len() == expected.len() && found.iter().zip(&expected).all(|(found, expected)| found == expected)
    } else {
        let mut expected = vec![0xA5; bytes];
        stamp(&mut expected, sequence);
        *context.state().get(KEY)?.ok_or_else(missing)? == expected[..]
    };
    if is_right {
        Ok(Output::empty())
    } else {
        Err(refuse(format!("wrong answer: the last {bytes} B that were put are others")))
    }
}

/// An input of [`REDUCE`]: the length of a key as a byte, the key, and a vector of 64-bit numbers.
pub(crate) fn reduce_input(key: &[u8], vector: &[i64]) -> Vec<u8> {
    let key_bytes = u8::try_from(key.len()).expect("a key of ours is short");
    let mut input = Vec::with_capacity(1 + key.len() + vector.len() * 8);
    input.push(key_bytes);
    input.extend_from_slice(key);
    input.extend(vector.iter().flat_map(|element| element.to_le_bytes()));
    input
}

/// Reads the accumulator where it lies, and writes the sum into the memory of the next one: one pass, no copy besides.
pub(super) fn reduce(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let parts = input.split_first().and_then(|(&key_bytes, rest)| rest.split_at_checked(key_bytes.into()));
    let Some((key, vector)) = parts.filter(|(_, vector)| !vector.is_empty() && vector.len().is_multiple_of(8)) else {
        return Err(refuse(format!("an input of {} B is no key and a vector of 64-bit numbers", input.len())));
    };
    let mut state = context.state();
    let accumulator = state.get(key)?;
    let mut sum = state.draft(key, vector.len())?;
    match &accumulator {
        None => sum.copy_from_slice(vector),
        Some(accumulator) if accumulator.len() == vector.len() => {
            let both = accumulator.as_chunks::<8>().0.iter().zip(vector.as_chunks::<8>().0);
            for (sum, (old, added)) in sum.as_chunks_mut::<8>().0.iter_mut().zip(both) {
                *sum = i64::from_le_bytes(*old).wrapping_add(i64::from_le_bytes(*added)).to_le_bytes();
            }
        }
        Some(accumulator) => {
            let (found, wanted) = (accumulator.len(), vector.len());
            return Err(refuse(format!("the accumulator has {found} B, the vector {wanted} B")));
        }
    }
    let ends = [&sum[..8], &sum[sum.len() - 8..]].concat();
    state.publish(sum)?;
    Ok(Output::from(ends))
}

/// Input: a key.
pub(super) fn take(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let mut state = context.state();
    let value = state.get(&**input)?.ok_or_else(missing)?.to_vec();
    state.delete(&**input)?;
    Ok(Output::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// B2: a torn value is seen, wherever it is torn.
    #[test]
    fn b2_a_value_that_is_half_old_and_half_new_is_torn() {
        for bytes in [16, 64, 1024] {
            let (mut old, mut new) = (vec![0xA5; bytes], vec![0xA5; bytes]);
            seal(&mut old, 41);
            seal(&mut new, 42);
            assert_eq!((sealed(&old), sealed(&new)), (Some(41), Some(42)));
            for at in (8..bytes).step_by(8) {
                let torn = [&new[..at], &old[at..]].concat();
                assert_eq!(sealed(&torn), None, "{bytes} B torn at {at}");
            }
        }
    }

    #[test]
    fn an_order_and_a_vector_make_an_input() {
        assert_eq!(reduce_input(b"k", &[1, -1])[..3], [1, b'k', 1]);
        assert_eq!(reduce_input(b"k", &[1, -1]).len(), 2 + 16);
    }
}
