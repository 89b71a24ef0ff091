//! Has two matrices multiplied and checks every number of the product: `matrix-client ADDRESS [SIZE]`, by default 200.
//!
//! Shows several arguments in one call. How to run it stands in `worker.rs`.

use std::time::Instant;

use anyhow::{Context, ensure};
use praas_dataplane::client::Outgoing;
use praas_dataplane::{Client, ClientConfig};

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    let address = words.next().context("usage: matrix-client ADDRESS [SIZE]")?;
    let size: u32 = words.next().map_or(Ok(200), |size| size.parse()).context("SIZE is a number")?;
    // Small whole numbers: their products and sums are exact, so the check can ask for equality.
    let left: Vec<f64> = (0..size * size).map(|i| f64::from(i % 17) - 8.0).collect();
    let right: Vec<f64> = (0..size * size).map(|i| f64::from(i % 13) - 6.0).collect();

    let mut client = Client::connect(&address, &ClientConfig::default())?;
    let begun = Instant::now();
    let reply = client.invoke("multiply", Outgoing::from_args(&[&bytes(&left), &bytes(&right)]))?;
    let took = begun.elapsed();

    let product: Vec<f64> = reply.as_chunks().0.iter().map(|eight| f64::from_le_bytes(*eight)).collect();
    ensure!(product == naive(&left, &right, size as usize), "the product is wrong");
    println!("{size} x {size}: right, in {:.2} ms", took.as_secs_f64() * 1e3);
    Ok(())
}

fn bytes(matrix: &[f64]) -> Vec<u8> {
    matrix.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// As in the schoolbook.
fn naive(left: &[f64], right: &[f64], size: usize) -> Vec<f64> {
    let number = |at: usize| {
        let (row, column) = (at / size, at % size);
        (0..size).map(|k| left[row * size + k] * right[k * size + column]).sum()
    };
    (0..size * size).map(number).collect()
}
