//! Asking running vCPUs what they are doing.
//!
//! Only a vCPU's own thread can see its registers, so a question is left for it, its
//! attention raised, and the answer waited for, but not for long: a thread that is stuck
//! in the host is itself the answer.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use softcpu::{Event, VcpuHandle};

/// How long all answers together may take.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Default)]
enum Question {
    #[default]
    None,
    Asked,
    Answered(String),
}

/// The questions and answers of all vCPUs.
#[derive(Debug)]
pub(crate) struct Inspector {
    questions: Mutex<Vec<Question>>,
    answered: Condvar,
    vcpus: Vec<VcpuHandle>,
}

impl Inspector {
    /// For these vCPUs.
    pub(crate) fn new(vcpus: Vec<VcpuHandle>) -> Self {
        let questions = Mutex::new(vec![Question::None; vcpus.len()]);
        Self { questions, answered: Condvar::new(), vcpus }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Question>> {
        self.questions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On a vCPU's thread: answers if there is a question.
    pub(crate) fn answer(&self, vcpu: usize, describe: impl FnOnce() -> String) {
        let mut questions = self.lock();
        if let Some(question @ Question::Asked) = questions.get_mut(vcpu) {
            *question = Question::Answered(describe());
            self.answered.notify_all();
        }
    }

    /// On any other thread: what all vCPUs are doing.
    pub(crate) fn ask(&self) -> String {
        self.lock().fill(Question::Asked);
        for vcpu in &self.vcpus {
            vcpu.raise(Event::ATTENTION);
        }
        let now = Instant::now();
        let deadline = now.checked_add(PATIENCE).unwrap_or(now);
        let mut questions = self.lock();
        while questions.iter().any(|question| matches!(question, Question::Asked)) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            questions = self
                .answered
                .wait_timeout(questions, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let answers =
            questions.iter_mut().enumerate().map(|(vcpu, question)| {
                match std::mem::take(question) {
                    Question::Answered(text) => text,
                    _ => format!("vcpu {vcpu} does not answer: its thread is busy in the host\n"),
                }
            });
        answers.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn those_who_answer_are_heard_and_the_others_named() {
        let handles = vec![VcpuHandle::new(), VcpuHandle::new()];
        let inspector = Arc::new(Inspector::new(handles.clone()));
        let answering = Arc::clone(&inspector);
        let vcpu = std::thread::spawn(move || {
            handles[0].sleep(Event::ATTENTION, None);
            answering.answer(0, || "here\n".into());
        });
        let text = inspector.ask();
        assert!(text.starts_with("here\nvcpu 1 does not answer"), "{text}");
        vcpu.join().unwrap();
        inspector.answer(1, || unreachable!("nobody asks any more"));
    }
}
