//! A product of matrices, its rows shared out to other workers.
//!
//! `multiply` takes two arguments, both square matrices of the same size as rows of little-endian `f64`, and answers with
//! their product. It cuts the first into bands of rows and submits one nested call of `rows` for each, multiplies a band
//! itself meanwhile, and joins: start everything, work, then wait. Each band is written straight into its place in the output,
//! which is a loan and so is handed over without a copy.
//!
//! ```sh
//! target/release/praas-process --worker target/release/matrix-worker --workers 4 --listen 127.0.0.1:4000 &
//! target/release/matrix-client 127.0.0.1:4000 256
//! ```

use praas_dataplane::{Context, Failure, Input, Output, Payload, Worker};

/// Bands besides our own: one nested call each.
const BANDS_SUBMITTED: usize = 3;
/// Bytes of a number.
const F64: usize = size_of::<f64>();

fn main() -> std::process::ExitCode {
    Worker::new().function("multiply", multiply).function("rows", rows).serve()
}

fn multiply(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let (left, right, size) = factors(&input)?;
    if left.len() != right.len() {
        return Err(Failure::new(
            -22,
            format!("{} and {} bytes are not two matrices of one size", left.len(), right.len()),
        ));
    }
    let mut product = context.loan(left.len())?;
    let row_bytes = size * F64;
    let band_bytes = size.div_ceil(BANDS_SUBMITTED + 1).max(1) * row_bytes;
    let mut bands = left.chunks(band_bytes).zip(product.chunks_mut(band_bytes));
    let ours = bands.next();
    let mut submitted = Vec::new();
    for (band, place) in bands {
        submitted.push((context.submit("rows", Payload::from_args(&[band, right]))?, place));
    }
    if let Some((band, place)) = ours {
        multiply_rows(band, right, size, place);
    }
    for (call, place) in submitted {
        let rows = context.wait(call)?;
        if rows.len() != place.len() {
            return Err(Failure::new(-1, "`rows` answered with another number of rows"));
        }
        place.copy_from_slice(&rows);
    }
    Ok(product.into())
}

/// Some rows of a matrix times a square matrix.
fn rows(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let (band, right, size) = factors(&input)?;
    let mut product = context.loan(band.len())?;
    multiply_rows(band, right, size, &mut product);
    Ok(product.into())
}

/// Rows, a square matrix, and its size.
fn factors(input: &Input) -> Result<(&[u8], &[u8], usize), Failure> {
    let args: Vec<&[u8]> = input.args().collect();
    let &[left, right] = args.as_slice() else {
        return Err(Failure::new(-22, format!("two matrices are needed, {} arguments came", args.len())));
    };
    let size = (right.len() / F64).isqrt();
    if size == 0 || right.len() != size * size * F64 || left.len() % (size * F64) != 0 {
        let text = format!("{} bytes are not rows for a square matrix of {} bytes of f64", left.len(), right.len());
        return Err(Failure::new(-22, text));
    }
    Ok((left, right, size))
}

fn multiply_rows(band: &[u8], right: &[u8], size: usize, product: &mut [u8]) {
    let right: Vec<f64> = numbers(right).collect();
    let mut sums = vec![0.0; size];
    for (row, place) in band.chunks(size * F64).zip(product.chunks_mut(size * F64)) {
        sums.fill(0.0);
        for (factor, right_row) in numbers(row).zip(right.chunks(size)) {
            for (sum, number) in sums.iter_mut().zip(right_row) {
                *sum += factor * number;
            }
        }
        for (bytes, sum) in place.chunks_exact_mut(F64).zip(&sums) {
            bytes.copy_from_slice(&sum.to_le_bytes());
        }
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = f64> {
    bytes.as_chunks().0.iter().map(|eight| f64::from_le_bytes(*eight))
}
