//! Chat templates against what transformers makes of them.
#![allow(missing_docs)]

mod common;

use std::borrow::Cow;

use common::{golden, tiny_model};
use iceformer_engine::{ChatError, ChatTemplate, Message, ModelFiles};
use serde_json::{Value, json};

fn template(config: Value) -> Result<Option<ChatTemplate>, ChatError> {
    let mut model = tiny_model(64, Vec::new());
    model.tokenizer_config = Some(Cow::Owned(config.to_string().into_bytes()));
    ModelFiles::from_memory("tiny", model).unwrap().chat_template()
}

fn render(source: &str) -> Result<String, ChatError> {
    let messages = [Message::new("user", "hello")];
    template(json!({ "chat_template": source })).unwrap().unwrap().render(&messages, true)
}

#[test]
fn text_equals_transformers() {
    let document: Value = serde_json::from_str(&std::fs::read_to_string(golden().join("chat.json")).unwrap()).unwrap();
    let cases = document["cases"].as_array().unwrap();
    assert!(cases.len() >= 50);
    for case in cases {
        let mut config = document["tokens"].clone();
        config["chat_template"] = document["templates"][case["template"].as_str().unwrap()].clone();
        let template = template(config).unwrap().unwrap();
        let messages: Vec<Message> = document["chats"][case["chat"].as_str().unwrap()]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| Message::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap()))
            .collect();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let rendered = template.render(&messages, prompt);
        let json = document["chats"][case["chat"].as_str().unwrap()].to_string();
        let from_json = template.render_json(&json, "{}", prompt);
        assert_eq!(format!("{rendered:?}"), format!("{from_json:?}"), "{case}");
        match (rendered, case.get("text"), case.get("refused")) {
            (Ok(text), Some(expected), None) => assert_eq!(text, expected.as_str().unwrap(), "{case}"),
            (Err(ChatError::Refused(words)), None, Some(expected)) => assert_eq!(words, expected.as_str().unwrap()),
            (result, ..) => panic!("{result:?} for {case}"),
        }
    }
}

#[test]
fn the_default_of_several_templates_is_taken() {
    let list = json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]);
    let chat = template(json!({ "chat_template": list })).unwrap().unwrap();
    assert_eq!(chat.render(&[Message::new("user", "hello")], false).unwrap(), "plain");
    assert_eq!(chat.source(), "plain");
    assert!(template(json!({})).unwrap().is_none());
    assert!(template(json!({ "chat_template": null })).unwrap().is_none());
}

/// Templates saved on Windows: Jinja takes every line end for a line feed, in strings too.
#[test]
fn line_ends_of_a_template_are_line_feeds() {
    let source = "{% for m in messages %}\n{{ m.role + '\n' }}\n\n{%- endfor %}\ntext\n{{ 'a\\r\\nb' }}\n";
    let expected = render(source).unwrap();
    assert_eq!(expected, "user\ntext\na\r\nb");
    for line_end in ["\r\n", "\r"] {
        assert_eq!(render(&source.replace('\n', line_end)).unwrap(), expected, "{line_end:?}");
    }
}

#[test]
fn added_tokens_may_be_described() {
    let config =
        json!({ "bos_token": {"content": "<s>", "lstrip": false}, "chat_template": "{{ bos_token }}{{ eos_token }}" });
    assert_eq!(template(config).unwrap().unwrap().render(&[Message::new("user", "hello")], false).unwrap(), "<s>");
    let config = json!({ "image_token": "<i>", "extra_special_tokens": {"tool": "<t>"},
        "chat_template": "{{ image_token }}{{ tool }}" });
    assert_eq!(template(config).unwrap().unwrap().render(&[Message::new("user", "hello")], false).unwrap(), "<i><t>");
}

#[test]
fn malformed_templates_are_one_line_errors() {
    for (config, expected) in [
        (json!({ "chat_template": "{% if %}" }), "chat template: syntax error"),
        (json!({ "chat_template": "{% for x in y %}" }), "chat template: syntax error"),
        (json!({ "chat_template": "{{ 'a\n".repeat(1000) }), "chat template: syntax error"),
        (json!({ "chat_template": "{% if x %}".repeat(1000) }), "chat template: syntax error"),
        (json!({ "chat_template": 7 }), "chat_template is \"7\""),
        (json!({ "chat_template": [{"name": "rag", "template": "x"}] }), "no template of the name default"),
        (json!({ "chat_template": {"rag": "x"} }), "no template of the name default"),
        (json!({ "chat_template": "x".repeat(2 << 20) }), "expected at most 1048576"),
    ] {
        let message = template(config).unwrap_err().to_string();
        assert!(message.contains("tokenizer_config.json: ") && message.contains(expected), "{message}");
        assert!(!message.contains('\n') && message.len() < 300, "{message}");
    }
}

#[test]
fn a_template_cannot_run_or_write_without_end() {
    for source in [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for a in range(1000) %}{{ 'x' * 90000000 }}{% endfor %}",
        "{{ undefined_function() }}",
        "{{ messages[0].content.no_such_method() }}",
        "{% include 'other' %}",
        "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x'.replace('', 'y' * 9000000) | list | tojson }}",
        "{{ 'x'.ljust(10000000000) }}{{ 'x' | center(10000000000) }}",
        "{{ '\t\t'.expandtabs(10000000000) }}",
        "{{ '{:10000000000d}'.format(1) }}",
        "{{ '{{}}{0:.5000000000f}{0:>5000000000}'.format(1) }}",
    ] {
        let message = render(source).unwrap_err().to_string();
        assert!(message.starts_with("the model's chat template fails: "), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
    let refused = render("{{ raise_exception('no\nthanks') }}").unwrap_err();
    assert_eq!(refused.to_string(), "the model's chat template refuses these messages: no\\nthanks");
}

/// Found by fuzzing: an older release of the library panicked when it reversed a slice of an empty list.
#[test]
fn empty_lists_can_be_reversed() {
    assert_eq!(render("{% for message in messages[1:][::-1] %}x{% endfor %}y").unwrap(), "y");
    let chat =
        template(json!({ "chat_template": "{% for message in messages[::-1] %}x{% endfor %}" })).unwrap().unwrap();
    assert!(chat.render(&[], true).unwrap_err().to_string().contains("at least one message"));
}

#[test]
fn a_long_message_fits() {
    let document: Value = serde_json::from_str(&std::fs::read_to_string(golden().join("chat.json")).unwrap()).unwrap();
    let long = "word <|x|> \n".repeat(300_000);
    for (name, source) in document["templates"].as_object().unwrap() {
        let chat = template(json!({ "chat_template": source })).unwrap().unwrap();
        let text = chat.render(&[Message::new("user", long.clone())], true).unwrap();
        assert!(text.len() >= long.len() - 1, "{name}");
    }
}

/// Every key of a message reaches the template, and variables do: whatever was not role or content was dropped once.
#[test]
fn messages_keep_their_keys() {
    let source = "{% for m in messages %}[{{ m | tojson }}]{% if m.tool_calls %}{{ m.tool_calls[0].arguments.city }}\
        {% endif %}{% endfor %}{{ enable_thinking }}{{ tools | tojson }}{{ documents is none }}{{ bos_token }}";
    let chat = template(json!({ "chat_template": source, "bos_token": "<s>" })).unwrap().unwrap();
    let messages = r#"[{"role": "assistant", "content": null, "tool_calls": [{"name": "w", "arguments": {"unit": 1.5,
        "city": "Paris"}}], "reasoning_content": "R"}]"#;
    let variables = r#"{"enable_thinking": false, "tools": [{"z": 1, "a": true}], "bos_token": "<b>"}"#;
    let expected = r#"[{"role": "assistant", "content": null, "tool_calls": [{"name": "w", "arguments": {"unit": 1.5, "city": "Paris"}}], "reasoning_content": "R"}]Paris"#;
    let text = chat.render_json(messages, variables, true).unwrap();
    assert_eq!(text.to_lowercase(), format!(r#"{expected}false[{{"z": 1, "a": true}}]true<b>"#).to_lowercase());
    for (messages, variables, expected) in [
        ("[1]", "{}", "message 0 is no object"),
        ("{}", "{}", "the messages are no JSON list"),
        ("[{}]", "[]", "the template's variables are no JSON object"),
        ("[{}]", r#"{"messages": []}"#, "the template's variable messages is set already"),
        ("[]", "{}", "at least one message"),
    ] {
        let message = chat.render_json(messages, variables, true).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn tools_choose_the_template_made_for_them() {
    for named in [
        json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]),
        json!({"tool_use": "tools", "default": "plain"}),
    ] {
        let chat = template(json!({ "chat_template": named })).unwrap().unwrap();
        let render = |variables| chat.render_json(r#"[{"role": "user", "content": "a"}]"#, variables, true).unwrap();
        assert_eq!(render(r#"{"tools": [{}]}"#), "tools");
        assert_eq!(render(r#"{"tools": null}"#), "plain");
    }
}
