//! Runs methods on cases: reads the text once for each method, then asks.

use std::ops::ControlFlow;

use iceformer_attention::{Method, Report};
use iceformer_engine::{
    Cancel, Finish, GenerationSettings, Model, Sampler, SamplerSettings, Session, SessionSettings, generate,
};

use crate::EvaluationError;
use crate::case::{Case, PlannedCase};
use crate::measurement::{Cost, Finding, Measurement, Place, Setup};
use crate::prompt::Question;
use crate::score::share_found;

/// Who is told how an evaluation goes.
pub trait Observer {
    /// `done` of `total` is done, in tokens read weighed with what they cost: later tokens attend to more.
    fn progress(&mut self, done: f64, total: f64);

    /// `done` of `of` cases are done by all methods.
    fn cases(&mut self, done: usize, of: usize) {
        let _ = (done, of);
    }

    /// One method is done with one case in one set-up; `reports` tells layer by layer what attention did for all that
    /// the method read.
    fn measured(&mut self, measurement: Measurement, reports: &[Report]);

    /// Something that the measurements do not tell, such as cases that were asked for but do not exist; a line of text.
    fn note(&mut self, note: String) {
        let _ = note;
    }
}

/// A model, and what is evaluated on it.
pub struct Driver<'a> {
    /// The model.
    pub model: &'a Model,
    /// How sessions read and keep tokens; the method is set for each contestant.
    pub settings: SessionSettings,
    /// Whether prompts went through a chat template, so that answers end at the end of a turn.
    pub chat: bool,
    /// The methods, in the order they run.
    pub methods: &'a [Method],
    /// Stops the work from another thread.
    pub cancel: Cancel,
}

/// What reading `tokens` costs, in arbitrary units: a share that every token takes, and one that grows with its position.
pub(crate) fn weight(tokens: usize) -> f64 {
    let tokens = tokens as f64;
    tokens * (1.0 + tokens / 16_384.0)
}

/// Progress over many pieces of work.
pub(crate) struct Work<'a> {
    pub observer: &'a mut dyn Observer,
    pub done: f64,
    pub total: f64,
}

impl Work<'_> {
    /// `tokens` of the piece in hand are read.
    pub fn reading(&mut self, tokens: usize) {
        self.observer.progress(self.done + weight(tokens), self.total);
    }

    /// A piece of `tokens` is done.
    pub fn finish(&mut self, tokens: usize) {
        self.done = (self.done + weight(tokens)).min(self.total);
        self.observer.progress(self.done, self.total);
    }
}

impl Driver<'_> {
    /// A session that reads by `method`.
    pub(crate) fn session(&self, method: Method) -> Result<Session, EvaluationError> {
        let mut session = self.model.session(&SessionSettings { method, ..self.settings.clone() })?;
        session.set_cancel(self.cancel.clone());
        Ok(session)
    }

    /// The set-ups of a method: of exact attention both are the same.
    pub(crate) fn setups(method: Method) -> &'static [Setup] {
        if method == Method::Exact { &[Setup::Everything] } else { &[Setup::Everything, Setup::QuestionExact] }
    }

    /// Runs every method on every case, one method after another within a case.
    ///
    /// # Errors
    /// When a case cannot be made or run, or the work is cancelled; what was measured before was told by then.
    pub fn run_cases(
        &self,
        evaluation: &'static str,
        cases: &[PlannedCase<'_>],
        observer: &mut dyn Observer,
    ) -> Result<(), EvaluationError> {
        let context = self.settings.check(self.model.decoder().config())?;
        if let Some(case) = cases.iter().find(|case| case.context > context) {
            let problem = format!("with its answer takes more than the context of {context} tokens: leave it out");
            return Err(EvaluationError::Length { length: case.tokens, problem });
        }
        let total = self.methods.len() as f64 * cases.iter().map(|case| weight(case.tokens)).sum::<f64>();
        let mut work = Work { observer, done: 0.0, total };
        for (index, planned) in cases.iter().enumerate() {
            work.observer.cases(index, cases.len());
            let case = (planned.make)()?;
            let place = Place {
                evaluation,
                task: case.task.clone(),
                group: case.group.clone(),
                case: case.number,
                tokens: case.tokens.longest(),
                depth: case.depth,
                source: None,
                first_token: None,
            };
            for &method in self.methods {
                self.run_case(&place, &case, method, &mut work)?;
                work.finish(planned.tokens);
            }
        }
        Ok(())
    }

    /// Reads `text` from the start of a session of its own.
    pub(crate) fn read_text(
        &self,
        method: Method,
        text: &[u32],
        work: &mut Work<'_>,
    ) -> Result<(Session, Cost), EvaluationError> {
        let mut session = self.session(method)?;
        let ((), cost) = Cost::of(|| {
            if !text.is_empty() {
                session.read(text, |done, _| work.reading(done))?;
            }
            Ok::<_, EvaluationError>(((), text.len()))
        })?;
        Ok((session, cost))
    }

    fn run_case(&self, place: &Place, case: &Case, method: Method, work: &mut Work<'_>) -> Result<(), EvaluationError> {
        let text = &case.tokens.text;
        let (mut session, text_cost) = self.read_text(method, text, work)?;
        let after_text = session.reports().to_vec();
        for &setup in Self::setups(method) {
            session.set_method(setup.method(method))?;
            let (mut answers, mut scores) = (Vec::new(), 0.0);
            let (mut question_cost, mut answer_cost) = (Cost::default(), Cost::default());
            for (question, tokens) in case.prompt.questions.iter().zip(&case.tokens.questions) {
                let (answer, costs) = self.ask(&mut session, question, tokens)?;
                question_cost.add(&costs[0]);
                answer_cost.add(&costs[1]);
                scores += share_found(&answer, &question.expected);
                answers.push(answer);
                session.truncate(text.len());
            }
            let questions = &case.prompt.questions;
            let score = scores / questions.len().max(1) as f64;
            let expected = questions.iter().map(|question| question.expected.clone()).collect();
            let finding = Finding::Answer { score, answers, expected };
            let mut measurement = Measurement::new(place, method, setup, text_cost, finding);
            (measurement.question, measurement.answer) = (question_cost, answer_cost);
            // What exact attention did for the question is no part of what the method did.
            let reports = if setup == Setup::Everything { session.reports() } else { &after_text };
            measurement.observe(reports);
            work.observer.measured(measurement, reports);
        }
        Ok(())
    }

    /// Reads a question and decodes the likeliest answer.
    fn ask(
        &self,
        session: &mut Session,
        question: &Question,
        tokens: &[u32],
    ) -> Result<(String, [Cost; 2]), EvaluationError> {
        let ((), question_cost) = Cost::of(|| {
            session.read(tokens, |_, _| {})?;
            Ok::<_, EvaluationError>(((), tokens.len()))
        })?;
        let settings = GenerationSettings {
            max_tokens: Some(question.max_tokens),
            stop: if self.chat { Vec::new() } else { question.stop.clone() },
            chat: self.chat,
            ignore_end: false,
        };
        let (answer, answer_cost) = Cost::of(|| {
            let before = session.tokens().len();
            let mut sampler = Sampler::new(SamplerSettings::default())?;
            let tokenizer = self.model.tokenizer();
            let answer = generate(session, tokenizer, &mut sampler, &settings, |_| ControlFlow::Continue(()))?;
            match answer.finish {
                Finish::Cancelled => Err(EvaluationError::Cancelled),
                _ => Ok((answer.text, session.tokens().len() - before)),
            }
        })?;
        Ok((answer, [question_cost, answer_cost]))
    }
}
