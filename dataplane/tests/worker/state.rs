//! Functions of the test worker that read and write the state.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use praas_dataplane::object::rkyv;
use praas_dataplane::{Context, Failure, Input, Object, Output, StateError, Worker, state_type};

state_type! {
    /// What the tests store as a type.
    #[derive(Debug, PartialEq, Clone)]
    pub(crate) struct Model {
        name: String,
        layers: Vec<Layer>,
        note: Option<String>,
    }

    #[derive(Debug, PartialEq, Clone)]
    pub(crate) struct Layer {
        weights: Vec<f64>,
        tags: Vec<String>,
    }

    /// Something else of the same size.
    #[derive(Debug, PartialEq, Clone)]
    pub(crate) struct Other {
        name: String,
        layers: Vec<Layer>,
        comment: Option<String>,
    }
}

thread_local! {
    static HELD: RefCell<Vec<Object>> = const { RefCell::new(Vec::new()) };
}

pub(crate) fn register(worker: Worker) -> Worker {
    worker
        .function("put", |context, input| {
            let [key, value] = arguments(&input)?;
            Ok(context.state().put(key, value)?.to_string().into())
        })
        .function("put_if", |context, input| {
            let [key, expected, value] = arguments(&input)?;
            answer(context.state().put_if(key, version(expected), value))
        })
        .function("get", |context, input| {
            Ok(match context.state().get(key(&input)?)? {
                Some(object) => object.to_vec().into(),
                None => Output::empty().with_status(1),
            })
        })
        .function("version", |context, input| {
            Ok(context.state().get(key(&input)?)?.map_or(0, |object| object.version()).to_string().into())
        })
        .function("delete", |context, input| Ok(context.state().delete(key(&input)?)?.to_string().into()))
        .function("delete_if", |context, input| {
            let [key, expected] = arguments(&input)?;
            answer(context.state().delete_if(key, version(expected).unwrap_or(0)))
        })
        .function("keys", |context, _| {
            let mut lines = Vec::new();
            for info in context.state().keys()? {
                lines.push(format!("{} {} {} {}", hex(&info.key), info.version, info.bytes, info.written_us));
            }
            Ok(lines.join("\n").into())
        })
        .function("put_and_ask", |context, input| {
            // Written here, read by a function on another worker, at once after `put` has returned.
            let [key, value] = arguments(&input)?;
            context.state().put(key, value)?;
            Ok(context.invoke("get", key)?.into())
        })
        .function("fill_object", |context, input| {
            let [key, bytes, byte] = arguments(&input)?;
            let mut draft = context.state().draft(key, usize::try_from(number(bytes)?).unwrap_or(usize::MAX))?;
            draft.fill(u8::try_from(number(byte)?).unwrap_or(0));
            answer(context.state().publish(draft))
        })
        .function("overwrite", overwrite)
        .function("put_many_and_sleep", |context, input| {
            // So many objects, and then for so many milliseconds no look at what the controller says.
            let [count, ms] = arguments(&input)?;
            for key in 0..number(count)? {
                context.state().put(key.to_le_bytes(), b"one of many")?;
            }
            context.state().put(b"written", b"")?;
            std::thread::sleep(Duration::from_millis(number(ms)?));
            Ok(b"slept".into())
        })
        .function("put_large_and_again", |context, input| {
            // As many megabytes as there is room for, and for so many milliseconds no look at what the controller says; then the same again.
            let [count, ms] = arguments(&input)?;
            for round in 0..2_u8 {
                for at in 0..number(count)? {
                    context.state().put([round, u8::try_from(at).unwrap_or(0)], vec![round; 900_000])?;
                }
                for at in 0..1000_u64 {
                    context.state().put((1000 * u64::from(round) + at).to_le_bytes(), b"small")?;
                }
                context.state().put("written", [round])?;
                std::thread::sleep(Duration::from_millis(number(ms)?));
            }
            Ok(b"twice".into())
        })
        .function("delete_large", |context, input| {
            for at in 0..1000_u64 {
                context.state().delete(at.to_le_bytes())?;
            }
            for at in 0..number(key(&input)?)? {
                context.state().delete([0, u8::try_from(at).unwrap_or(0)])?;
            }
            Ok(Output::empty())
        })
        .function("delete_many", |context, input| {
            let mut deleted = 0_u64;
            for key in 0..number(key(&input)?)? {
                deleted += u64::from(context.state().delete(key.to_le_bytes())?);
            }
            Ok(deleted.to_string().into())
        })
        .function("increment", increment)
        .function("watch", watch)
        .function("hold", |context, input| {
            let held = context.state().get(key(&input)?)?.ok_or_else(|| Failure::new(-2, "nothing to hold"))?;
            HELD.with_borrow_mut(|all| all.push(held));
            Ok(std::process::id().to_string().into())
        })
        .function("hold_or_not", |context, input| {
            // Not more than a few.
            HELD.with_borrow_mut(|all| {
                all.truncate(20);
                all.extend(context.state().get(key(&input)?)?);
                Ok(Output::empty())
            })
        })
        .function("hold_all", |context, input| {
            // Until it is told that there are too many.
            let mut held = Vec::new();
            loop {
                match context.state().get(key(&input)?) {
                    Ok(Some(object)) => held.push(object),
                    Ok(None) => return Err(Failure::new(-2, "nothing to hold")),
                    Err(error) => return Ok(format!("{} {error}", held.len()).into()),
                }
            }
        })
        .function("held", |_, _| {
            HELD.with_borrow(|held| Ok(held.iter().flat_map(|held| held.to_vec()).collect::<Vec<_>>().into()))
        })
        .function("let_go", |_, _| {
            HELD.with_borrow_mut(Vec::clear);
            Ok(Output::empty())
        })
        .function("put_and_die", |context, input| {
            let [key, value] = arguments(&input)?;
            context.state().put(key, value)?;
            std::process::abort()
        })
        .function("draft_and_die", |context, input| {
            let mut draft = context.state().draft(key(&input)?, 100_000)?;
            draft.fill(1);
            std::process::abort()
        })
        .function("put_model", |context, input| {
            let [key, layers] = arguments(&input)?;
            answer(context.state().put_typed(key, &model(number(layers)?)))
        })
        .function("get_model", |context, input| {
            let [key, layers] = arguments(&input)?;
            let Some(found) = context.state().get_typed::<Model>(key)? else {
                return Ok(Output::empty().with_status(1));
            };
            let copy = rkyv::deserialize::<Model, rkyv::rancor::Error>(&*found)
                .map_err(|error| Failure::new(-5, error.to_string()))?;
            if copy != model(number(layers)?) {
                return Err(Failure::new(-6, "another model"));
            }
            // Again: this time it is known to be one.
            let again = context.state().get_typed::<Model>(key)?.ok_or_else(|| Failure::new(-2, "gone"))?;
            Ok(again.name.as_str().to_owned().into())
        })
        .function("which_model", |context, input| {
            // How many layers it has, once all of it is what a model of so many is.
            let Some(found) = context.state().get_typed::<Model>(key(&input)?)? else {
                return Ok(Output::empty().with_status(1));
            };
            let copy = rkyv::deserialize::<Model, rkyv::rancor::Error>(&*found)
                .map_err(|error| Failure::new(-5, error.to_string()))?;
            let layers = copy.layers.len() as u64;
            if copy != model(layers) {
                return Err(Failure::new(-6, "another model"));
            }
            Ok(layers.to_string().into())
        })
        .function("get_other", |context, input| {
            let found = context.state().get_typed::<Other>(key(&input)?);
            Ok(match found {
                Ok(_) => b"took it for another type".into(),
                Err(error) => error.to_string().into(),
            })
        })
        .function("copy_flipped", |context, input| {
            // The same object with one bit of its archive flipped, still said to be a model: what a broken store would bring.
            let [from, to, bit] = arguments(&input)?;
            let found = context.state().get_typed::<Model>(from)?.ok_or_else(|| Failure::new(-2, "gone"))?;
            let mut bytes = found.object().to_vec();
            let bit = usize::try_from(number(bit)?).unwrap_or(0) % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            context.state().put(to, bytes)?;
            Ok(Output::empty())
        })
}

fn model(layers: u64) -> Model {
    let layer = |at: u64| Layer {
        weights: (0..at % 50).map(|weight| weight as f64 / 3.0).collect(),
        tags: (0..at % 4).map(|tag| format!("tag {tag} of {at}")).collect(),
    };
    Model { name: format!("{layers} layers"), layers: (0..layers).map(layer).collect(), note: None }
}

/// Writes `count` objects of `bytes` bytes under a key, all bytes of one the same. The last version.
fn overwrite(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let [key, count, bytes] = arguments(&input)?;
    let mut value = vec![0; usize::try_from(number(bytes)?).unwrap_or(0)];
    let mut version = 0;
    for round in 0..number(count)? {
        value.fill(u8::try_from(round % 251).unwrap_or(0));
        version = context.state().put(key, &value)?;
    }
    Ok(version.to_string().into())
}

/// Adds one to a counter so often, however many others do the same. How often somebody else was faster.
fn increment(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let [key, times] = arguments(&input)?;
    let (mut lost, mut won) = (0_u64, 0);
    while won < number(times)? {
        let current = context.state().get(key)?;
        let value = current.as_ref().and_then(|object| Some(u64::from_le_bytes(*object.first_chunk()?))).unwrap_or(0);
        let expected = current.map(|object| object.version());
        match context.state().put_if(key, expected, (value + 1).to_le_bytes()) {
            Ok(_) => won += 1,
            Err(StateError::Conflict { current }) if current != expected => lost += 1,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(lost.to_string().into())
}

/// Reads a key for so many milliseconds, while others overwrite it: all bytes of an object are the same, and its version never goes back. The
/// number of reads.
fn watch(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let [key, ms] = arguments(&input)?;
    let until = Instant::now() + Duration::from_millis(number(ms)?);
    let (mut reads, mut seen) = (0_u64, 0);
    while Instant::now() < until {
        let Some(object) = context.state().get(key)? else { return Err(Failure::new(-2, "missing")) };
        let first = object.first().copied();
        if object.iter().any(|byte| Some(*byte) != first) {
            return Err(Failure::new(-3, format!("a torn object of version {}", object.version())));
        }
        if object.version() < seen {
            return Err(Failure::new(-4, format!("version {} after {seen}", object.version())));
        }
        seen = object.version();
        reads += 1;
    }
    Ok(reads.to_string().into())
}

fn answer<T: ToString>(result: Result<T, StateError>) -> Result<Output, Failure> {
    Ok(match result {
        Ok(value) => value.to_string().into(),
        Err(StateError::Conflict { current }) => {
            Output::from(current.map_or("none".to_owned(), |version| version.to_string())).with_status(1)
        }
        Err(error) => return Err(error.into()),
    })
}

fn version(text: &[u8]) -> Option<u64> {
    number(text).ok()
}

pub(crate) fn number(text: &[u8]) -> Result<u64, Failure> {
    let text = String::from_utf8_lossy(text);
    text.parse().map_err(|_| Failure::new(-22, format!("`{text}` is no number")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn key(input: &Input) -> Result<&[u8], Failure> {
    arguments::<1>(input).map(|[key]| key)
}

pub(crate) fn arguments<const N: usize>(input: &Input) -> Result<[&[u8]; N], Failure> {
    let all: Vec<&[u8]> = input.args().collect();
    all.try_into().map_err(|all: Vec<_>| Failure::new(-22, format!("{N} arguments, not {}", all.len())))
}
