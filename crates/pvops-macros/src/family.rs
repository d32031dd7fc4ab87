//! `family!`: a table of operations, its types, and the functions that call through it.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{
    Attribute, Error, Expr, FnArg, Ident, ItemUse, LitInt, Result, ReturnType, Signature, Token,
    Visibility, braced, parenthesized,
};

use crate::signature::{Simple, simple};
use crate::site;

/// The most bytes a site may have: its length is one byte of the record.
const ROOM_MAX: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    CalleeSave,
    Jump,
    Direct,
}

/// One operation as declared.
pub(crate) struct Operation {
    attributes: Vec<Attribute>,
    pub(crate) kind: Kind,
    /// Bytes reserved at each site.
    pub(crate) room: usize,
    pub(crate) unsafety: Option<Token![unsafe]>,
    name: Ident,
    pub(crate) parts: Simple,
    default: Option<Expr>,
}

struct Declaration {
    attributes: Vec<Attribute>,
    vis: Visibility,
    name: Ident,
    uses: Vec<ItemUse>,
    operations: Vec<Operation>,
}

impl Parse for Operation {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let attributes = input.call(Attribute::parse_outer)?;
        let word: Ident = input.parse()?;
        let kind = match word.to_string().as_str() {
            "plain" => Kind::Plain,
            "callee_save" => Kind::CalleeSave,
            "jump" => Kind::Jump,
            "direct" => Kind::Direct,
            _ => {
                return Err(Error::new(
                    word.span(),
                    "an op is `plain`, `callee_save`, `jump` or `direct`",
                ));
            }
        };
        let mut room = site::CALL_LEN;
        if input.peek(syn::token::Paren) {
            let inner;
            parenthesized!(inner in input);
            let key: Ident = inner.parse()?;
            inner.parse::<Token![=]>()?;
            let value: LitInt = inner.parse()?;
            room = value.base10_parse()?;
            if key != "room" || !(site::CALL_LEN..=ROOM_MAX).contains(&room) {
                return Err(Error::new(key.span(), "expected `room = N`, N from 6 to 64 bytes"));
            }
        }
        let unsafety = input.parse()?;
        let fn_token: Token![fn] = input.parse()?;
        let name: Ident = input.parse()?;
        let inner;
        let paren_token = parenthesized!(inner in input);
        let inputs: Punctuated<FnArg, Token![,]> = Punctuated::parse_terminated(&inner)?;
        let output: ReturnType = input.parse()?;
        let mut signature: Signature = syn::parse_quote!(fn x());
        signature.fn_token = fn_token;
        signature.ident = name.clone();
        signature.paren_token = paren_token;
        signature.inputs = inputs;
        signature.output = output;
        let parts = simple(&signature)?;
        if parts.never != (kind == Kind::Jump) {
            return Err(Error::new(
                name.span(),
                "`jump` ops return `!`, and only they do: a jump target never comes back",
            ));
        }
        let default = match input.parse::<Option<Token![=]>>()? {
            Some(_) => Some(input.parse()?),
            None => None,
        };
        input.parse::<Token![;]>()?;
        Ok(Self { attributes, kind, room, unsafety, name, parts, default })
    }
}

impl Parse for Declaration {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let attributes = input.call(Attribute::parse_outer)?;
        let vis = input.parse()?;
        input.parse::<Token![mod]>()?;
        let name = input.parse()?;
        let inner;
        braced!(inner in input);
        let mut uses = Vec::new();
        while inner.peek(Token![use]) {
            uses.push(inner.parse()?);
        }
        let mut operations: Vec<Operation> = Vec::new();
        while !inner.is_empty() {
            let op: Operation = inner.parse()?;
            if operations.iter().any(|other| other.name == op.name) {
                return Err(Error::new(op.name.span(), "the family has an op of this name"));
            }
            operations.push(op);
        }
        Ok(Self { attributes, vis, name, uses, operations })
    }
}

/// `save_fl` becomes `SaveFl`.
fn camel(name: &Ident) -> Ident {
    let text: String = name
        .to_string()
        .split('_')
        .map(|part| {
            let mut chars = part.chars();
            chars.next().map_or(String::new(), |c| c.to_uppercase().chain(chars).collect())
        })
        .collect();
    format_ident!("{text}", span = name.span())
}

fn marker(index: usize, op: &Operation) -> TokenStream {
    let (name, unsafety, types) = (camel(&op.name), &op.unsafety, &op.parts.types);
    let ret = if op.parts.never {
        quote!(-> !)
    } else {
        op.parts.ret.iter().map(|ty| quote!(-> #ty)).collect()
    };
    let wrapper = match op.kind {
        Kind::CalleeSave => quote!(CalleeSave),
        Kind::Plain | Kind::Direct => quote!(Plain),
        Kind::Jump => quote!(JumpTarget),
    };
    let about = format!("The op `{}`.", op.name);
    quote! {
        #[doc = #about]
        #[derive(Clone, Copy, Debug)]
        pub struct #name;

        // SAFETY: the op's sites are generated from the same declaration, at this index.
        unsafe impl ::pvops::Op for #name {
            type Family = super::Family;
            type Pointer = ::pvops::#wrapper<#unsafety extern "sysv64" fn(#(#types),*) #ret>;
            const INDEX: usize = #index;
        }
    }
}

fn info(op: &Operation) -> TokenStream {
    let name = op.name.to_string();
    let kind = match op.kind {
        Kind::Plain => quote!(Some(::pvops::CallKind::Plain)),
        Kind::CalleeSave => quote!(Some(::pvops::CallKind::CalleeSave)),
        Kind::Jump => quote!(Some(::pvops::CallKind::Jump)),
        Kind::Direct => quote!(None),
    };
    let (args, returns) = (op.parts.types.len(), op.parts.ret.is_some());
    quote!(::pvops::OpInfo { name: #name, sites: #kind, args: #args, returns: #returns })
}

fn function(index: usize, op: &Operation) -> TokenStream {
    let (attributes, unsafety, name) = (&op.attributes, &op.unsafety, &op.name);
    let (names, types) = (&op.parts.names, &op.parts.types);
    let ret = if op.parts.never {
        quote!(-> !)
    } else {
        op.parts.ret.iter().map(|ty| quote!(-> #ty)).collect()
    };
    let words = op.parts.types.iter().chain(&op.parts.ret);
    // Direct ops are ordinary calls: what they pass need not fit a register.
    let words = (op.kind != Kind::Direct).then(|| {
        quote! {
            const _: fn() = || {
                fn word<T: ::pvops::Word>() {}
                #(word::<#words>();)*
            };
        }
    });
    let body = site::body(index, op);
    quote! {
        #(#attributes)*
        #[inline(always)]
        #[allow(clippy::inline_always)]
        pub #unsafety fn #name(#(#names: #types),*) #ret {
            #words
            #body
        }
    }
}

/// See [`family`](macro@crate::family).
pub(crate) fn expand(input: TokenStream) -> Result<TokenStream> {
    let Declaration { attributes, vis, name, uses, operations } = syn::parse2(input)?;
    let count = operations.len();
    if count == 0 {
        return Err(Error::new(name.span(), "a family without operations has nothing to bind"));
    }
    let family = name.to_string();
    let markers = operations.iter().enumerate().map(|(i, op)| marker(i, op));
    let infos = operations.iter().map(info);
    let functions = operations.iter().enumerate().map(|(i, op)| function(i, op));
    let defaults = operations.iter().map(|op| match &op.default {
        Some(default) => {
            let marker = camel(&op.name);
            quote!(Some({
                const DEFAULT: ::pvops::Binding<<op::#marker as ::pvops::Op>::Pointer> = #default;
                DEFAULT.erase()
            }))
        }
        None => quote!(None),
    });
    Ok(quote! {
        #(#attributes)*
        #vis mod #name {
            #[allow(unused_imports)]
            #(#uses)*

            /// One type for each op: what a binding is made for.
            pub mod op {
                #[allow(unused_imports)]
                use super::*;
                #(#markers)*
            }

            /// The family itself: claim it to bind and patch its ops.
            #[derive(Clone, Copy, Debug)]
            pub struct Family;

            const DEFAULTS: [::core::option::Option<::pvops::Erased>; #count] = [#(#defaults),*];
            const OPS: [::pvops::OpInfo; #count] = [#(#infos),*];
            static TABLE: ::pvops::Table<#count> = ::pvops::Table::new(&DEFAULTS);

            // SAFETY: the table, the ops and the defaults were generated together, and
            // each site's slot is its op's place in the table.
            unsafe impl ::pvops::Family for Family {
                type Bound = [::core::option::Option<::pvops::Erased>; #count];
                const NAME: &'static str = #family;
                const OPS: &'static [::pvops::OpInfo] = &OPS;
                const DEFAULTS: Self::Bound = DEFAULTS;
                fn slots() -> ::pvops::Slots {
                    TABLE.slots()
                }
            }

            #(#functions)*
        }
    })
}
