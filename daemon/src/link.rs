//! The service's end of a worker's control socket.

use std::io;
use std::os::unix::net::UnixStream;

use gcgroup_kernels::engine::EngineError;
use gcgroup_kernels::protocol::{Answer, Command, Counters, Message, Request};
use gcgroup_model::change::Refusal;
use gcgroup_model::snapshot::NodeId;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc::UnboundedSender;

use crate::controller::Event;

/// Request ids below are used while a worker is prepared, ids from here on by
/// the controller.
pub(crate) const FIRST_JOB: u64 = 1 << 10;

/// A worker that is being prepared: one question at a time.
#[derive(Debug)]
pub(crate) struct Link {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    next_id: u64,
}

/// What a worker's refusal means to the user who asked.
pub(crate) fn refusal(error: EngineError) -> Refusal {
    match error {
        EngineError::NoDevice(why) => Refusal::Gone(format!("the GPU ({why})")),
        EngineError::Unsupported(why) => Refusal::Unsupported(why),
        EngineError::NoMemory { .. } => Refusal::NoSpace(error.to_string()),
        EngineError::NoSlot(why) => Refusal::Busy(format!("no MPS client slot is free: {why}")),
        EngineError::Ended => Refusal::Gone("the workload".to_owned()),
        EngineError::Failed(why) => Refusal::Failed(format!("the GPU failed: {why}")),
    }
}

impl Link {
    /// Takes our end of the socket, which must be nonblocking.
    ///
    /// # Errors
    /// Those of registering it with the runtime.
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        let (reader, writer) = tokio::net::UnixStream::from_std(socket)?.into_split();
        Ok(Self {
            reader: BufReader::new(reader),
            writer,
            next_id: 1,
        })
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// The worker's refusal, or [`Refusal::Failed`] when it ended.
    pub(crate) async fn call(&mut self, command: Command) -> Result<Answer, Refusal> {
        self.call_counted(command).await.map(|(answer, _)| answer)
    }

    /// As [`Link::call`], with the worker's counters at that moment.
    ///
    /// # Errors
    /// As [`Link::call`].
    pub(crate) async fn call_counted(
        &mut self,
        command: Command,
    ) -> Result<(Answer, Option<Counters>), Refusal> {
        let lost = |error: io::Error| Refusal::Failed(format!("the worker ended early: {error}"));
        let id = self.next_id;
        self.next_id += 1;
        let line = encode(&Request { id, command }).map_err(lost)?;
        self.writer.write_all(&line).await.map_err(lost)?;
        loop {
            match read(&mut self.reader).await.map_err(lost)? {
                Some(Message::Reply {
                    id: of,
                    result,
                    counters,
                }) if of == id => {
                    return result.map(|answer| (answer, counters)).map_err(refusal);
                }
                Some(Message::Ending { error: Some(error) }) => return Err(refusal(error)),
                Some(_) => {}
                None => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }

    /// Hands what the worker says from now on to the controller.
    pub(crate) fn adopt(self, node: NodeId, events: UnboundedSender<Event>) -> Sender {
        let mut reader = self.reader;
        tokio::spawn(async move {
            loop {
                let event = match read(&mut reader).await {
                    Ok(Some(message)) => Event::Worker {
                        node,
                        message: Box::new(message),
                    },
                    Ok(None) => Event::WorkerGone { node },
                    Err(error) => {
                        tracing::warn!(%error, "a worker's socket failed");
                        Event::WorkerGone { node }
                    }
                };
                let last = matches!(event, Event::WorkerGone { .. });
                if events.send(event).is_err() || last {
                    break;
                }
            }
        });
        Sender {
            writer: self.writer,
        }
    }
}

/// Sends commands to a worker without ever waiting.
#[derive(Debug)]
pub(crate) struct Sender {
    writer: OwnedWriteHalf,
}

impl Sender {
    /// Hands a command over.
    ///
    /// # Errors
    /// The worker is gone, or it has not read for so long that the socket is
    /// full; a lane has one command under way, so it hangs then.
    pub(crate) fn send(&self, id: u64, command: Command) -> io::Result<()> {
        let line = encode(&Request { id, command })?;
        let written = self.writer.try_write(&line)?;
        if written < line.len() {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                "the worker does not read",
            ));
        }
        Ok(())
    }
}

fn encode(request: &Request) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    Ok(line)
}

async fn read(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Message>> {
    let mut line = String::new();
    if reader.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}
