//! The reduction with its state in Redis: a function that adds the vector it is called with to the accumulator under a key.
//!
//! GET, add, SET: as a function without state of its own has to. One invocation of a reduction runs at a time, so nothing is lost in
//! between.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::client::{Connection, RedisError};
use crate::placement::Wait;

/// What precedes the vector in an input: the length of this as JSON (two bytes, little-endian), and this.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) redis: SocketAddr,
    pub(crate) wait: Wait,
    /// Of the accumulator. No value there is a vector of zeros.
    pub(crate) key: String,
}

/// Why nothing was added, or nobody knows.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReduceError {
    #[error("an input of {0} B is no order and a vector of 64-bit numbers")]
    NoOrder(usize),
    #[error(transparent)]
    Redis(#[from] RedisError),
    #[error("the accumulator has {found_bytes} B, the vector {vector_bytes} B")]
    OtherLength { found_bytes: usize, vector_bytes: usize },
}

impl Order {
    /// An input with this order and a vector.
    pub(crate) fn with_vector(&self, vector: &[i64]) -> serde_json::Result<Vec<u8>> {
        let order = serde_json::to_vec(self)?;
        let order_bytes = u16::try_from(order.len()).expect("an address, a mode and a key are short");
        let mut input = Vec::with_capacity(2 + order.len() + vector.len() * 8);
        input.extend_from_slice(&order_bytes.to_le_bytes());
        input.extend_from_slice(&order);
        input.extend(vector.iter().flat_map(|element| element.to_le_bytes()));
        Ok(input)
    }

    /// The order and the vector's bytes.
    fn of(input: &[u8]) -> Option<(Order, &[u8])> {
        let (order_bytes, rest) = input.split_first_chunk::<2>()?;
        let (order, vector) = rest.split_at_checked(u16::from_le_bytes(*order_bytes).into())?;
        let order = serde_json::from_slice(order).ok()?;
        (!vector.is_empty() && vector.len().is_multiple_of(8)).then_some((order, vector))
    }
}

/// What a worker keeps from one invocation to the next: its connection, and memory.
#[derive(Debug, Default)]
pub(crate) struct Reducer {
    connection: Option<(SocketAddr, Wait, Connection)>,
    accumulator: Vec<u8>,
}

/// The accumulator's first and last element after an invocation, as its answer.
pub(crate) const ANSWER_BYTES: usize = 16;

impl Reducer {
    /// One invocation. After an error the connection is made anew the next time.
    pub(crate) fn add(&mut self, input: &[u8]) -> Result<[u8; ANSWER_BYTES], ReduceError> {
        let (order, vector) = Order::of(input).ok_or(ReduceError::NoOrder(input.len()))?;
        let mut connection = match self.connection.take() {
            Some((redis, wait, connection)) if (redis, wait) == (order.redis, order.wait) => connection,
            _ => Connection::open(order.redis, order.wait)?,
        };
        self.accumulator.resize(vector.len(), 0);
        match connection.get(&order.key, &mut self.accumulator)? {
            Some(found_bytes) if found_bytes == vector.len() => {}
            Some(found_bytes) => return Err(ReduceError::OtherLength { found_bytes, vector_bytes: vector.len() }),
            None => self.accumulator.fill(0),
        }
        let (elements, _) = self.accumulator.as_chunks_mut::<8>();
        for (element, added) in elements.iter_mut().zip(vector.as_chunks::<8>().0) {
            *element = i64::from_le_bytes(*element).wrapping_add(i64::from_le_bytes(*added)).to_le_bytes();
        }
        let mut answer = [0; ANSWER_BYTES];
        if let (Some(first), Some(last)) = (elements.first(), elements.last()) {
            answer[..8].copy_from_slice(first);
            answer[8..].copy_from_slice(last);
        }
        connection.set(&order.key, &self.accumulator)?;
        self.connection = Some((order.redis, order.wait, connection));
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redis::RedisArgs;

    fn order(redis: SocketAddr, key: &str) -> Order {
        Order { redis, wait: Wait::Efficient, key: key.to_owned() }
    }

    /// Oracle: the sum, computed here.
    #[test]
    fn vectors_add_up_under_their_key() {
        let host = RedisArgs::default().host(Wait::Efficient).unwrap();
        let Some(host) = host else { return println!("skipped: needs redis-server") };
        let mut reducer = Reducer::default();
        let vector: Vec<i64> = (-5..5_000).map(|n| n * 1_000_003).collect();
        for times in 1..=3 {
            let answer = reducer.add(&order(host.address(), "sum").with_vector(&vector).unwrap()).unwrap();
            let expected: Vec<u8> =
                [vector[0], vector[vector.len() - 1]].iter().flat_map(|end| (end * times).to_le_bytes()).collect();
            assert_eq!(answer[..], expected[..]);
        }
        let mut kept = vec![0; vector.len() * 8];
        let mut connection = Connection::open(host.address(), Wait::Efficient).unwrap();
        assert_eq!(connection.get("sum", &mut kept).unwrap(), Some(kept.len()));
        let expected: Vec<u8> = vector.iter().flat_map(|element| (element * 3).to_le_bytes()).collect();
        assert_eq!(kept, expected);
        let shorter = reducer.add(&order(host.address(), "sum").with_vector(&vector[..10]).unwrap()).unwrap_err();
        assert!(matches!(shorter, ReduceError::Redis(RedisError::TooLong { .. })), "{shorter}");
        // The connection was out of step and is made anew.
        reducer.add(&order(host.address(), "other").with_vector(&vector).unwrap()).unwrap();
    }

    #[test]
    fn an_input_without_order_or_vector_is_refused() {
        let whole = order(SocketAddr::from(([127, 0, 0, 1], 9)), "k").with_vector(&[1, 2]).unwrap();
        for input in [&whole[..whole.len() - 1], &whole[..whole.len() - 16], &whole[..10], b"\xff\xff{}", b""] {
            let error = Reducer::default().add(input).unwrap_err();
            assert!(matches!(error, ReduceError::NoOrder(bytes) if bytes == input.len()), "{error}");
        }
    }
}
