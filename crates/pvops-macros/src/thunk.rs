//! The text of a thunk, for either width: derived from the table of conventions.
//!
//! Called by the attribute (64-bit, inside `naked_asm!`) and by `thunk_text!` (either
//! width, for `global_asm!`).

use proc_macro2::TokenStream;
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::{LitInt, LitStr, Result, Token};

use crate::convention::{Convention, Width, X86_32, X86_64};

/// The lines of a thunk's body, without its label. `callee` is spelled as the assembler
/// wants it.
pub(crate) fn lines(convention: &Convention, callee: &str) -> Vec<String> {
    let saves = convention.thunk_saves();
    let pad = convention.thunk_pad(saves.len());
    let (stack, landing) = match convention.width {
        Width::Bits64 => ("rsp", "endbr64"),
        Width::Bits32 => ("esp", "endbr32"),
    };
    // Before patching, sites reach the thunk by an indirect call.
    let mut lines = vec![landing.to_owned()];
    lines.extend(saves.iter().map(|r| format!("push {}", r.name(convention.width))));
    if pad != 0 {
        lines.push(format!("sub {stack}, {pad}"));
    }
    lines.push(format!("call {callee}"));
    if pad != 0 {
        lines.push(format!("add {stack}, {pad}"));
    }
    lines.extend(saves.iter().rev().map(|r| format!("pop {}", r.name(convention.width))));
    lines.push("ret".to_owned());
    lines
}

struct Text {
    convention: &'static Convention,
    label: String,
    callee: String,
}

impl Parse for Text {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let width: LitInt = input.parse()?;
        let convention = match width.base10_parse::<u32>()? {
            32 => &X86_32,
            64 => &X86_64,
            _ => return Err(syn::Error::new(width.span(), "the width is 32 or 64")),
        };
        input.parse::<Token![,]>()?;
        let label: LitStr = input.parse()?;
        input.parse::<Token![,]>()?;
        let callee: LitStr = input.parse()?;
        input.parse::<Option<Token![,]>>()?;
        Ok(Self { convention, label: label.value(), callee: callee.value() })
    }
}

/// `thunk_text!(width, "label", "callee")`.
pub(crate) fn expand_text(input: TokenStream) -> Result<TokenStream> {
    let Text { convention, label, callee } = syn::parse2(input)?;
    let text = format!("{label}:\n{}\n", lines(convention, &callee).join("\n"));
    Ok(quote!(#text))
}
